"""What is loaded cannot execute; docs/security.md says what is defended (C5)."""

import ast
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from tokenizers_for_tests import CHATML, byte_tokenizer

ROOT = Path(__file__).parents[1]
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def offences(source):
    """Calls and imports in a module that could unpickle."""
    for node in ast.walk(source):
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (name == "torch.load" and keywords.get("weights_only") != "True") or "allow_pickle" in keywords:
                yield name
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") or name.endswith("read_pickle"):
                yield name
        imported = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {name.split(".")[0] for name in imported} & PICKLERS


def test_nothing_unpickles():
    """C5: in no file of the package."""
    found = {str(path): list(offences(ast.parse(path.read_text()))) for path in (ROOT / "trl").rglob("*.py")}
    assert len(found) > 150
    plain = ROOT / "trl" / "models" / "weight_files.py"  # with an unpickler that knows a few classes of plain data
    assert found.pop(str(plain)) == ["pickle"]
    nodes = [node for node in ast.walk(ast.parse(plain.read_text())) if isinstance(node, ast.Attribute)]
    uses = {ast.unparse(node) for node in nodes if ast.unparse(node.value) == "pickle"}
    assert uses == {"pickle.Unpickler", "pickle.UnpicklingError"}
    assert {path: names for path, names in found.items() if names} == {}
    bad = (
        "import pickle\nimport joblib.x\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nyaml.load(f)\npd.read_pickle(f)"
    )
    assert len(list(offences(ast.parse(bad)))) == 6


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["zip", "plain"])
def test_bombs_among_weights_do_not_go_off(tmp_path, how):
    """C5: a model's, a value head's and an aesthetic predictor's file."""
    from trl import AutoModelForCausalLMWithValueHead
    from trl.rewards.images import AestheticHead

    mark = tmp_path / "exploded"
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    weights = tmp_path / "model" / "pytorch_model.bin"
    bomb = {"v_head.summary.weight": Bomb(mark)}
    if how == "zip":
        torch.save(bomb, weights)
    else:
        weights.write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    with pytest.raises(pickle.UnpicklingError):
        AestheticHead.from_file(str(weights))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # it is one
    assert mark.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
@pytest.mark.parametrize("source", ["tokenizer", "file", "none kept", "row"])
def test_chat_templates_are_rendered_in_a_sandbox(attack, source, tmp_path):
    """Item 3: by every way that we render one."""
    from trl.data.chat import ChatTemplate
    from trl.models.chat_setup import template_at

    template = CHATML + attack
    if source == "file":
        (tmp_path / "template.jinja").write_text(template)
        template = template_at(str(tmp_path / "template.jinja"))
    messages = [{"role": "user", "content": None if source == "none kept" else "Hi."}]
    row = {"chat_template_kwargs": {"chat_template": template}} if source == "row" else {}
    with pytest.raises(ValueError, match=r"cannot render the roles user: .*(unsafe|undefined|has no)"):
        ChatTemplate(byte_tokenizer(CHATML if row else template)).of_row(row).render(messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**15 }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 10.0 ** 1000 }}",
        "{{ '\u00e9'.encode('ascii') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_chat_template_raises_is_named(attack):
    """No raw OverflowError, MemoryError, ZeroDivisionError or RecursionError."""
    from trl.data.chat import ChatTemplate

    with pytest.raises(ValueError, match="the chat template cannot render the roles user"):
        ChatTemplate(byte_tokenizer(CHATML + attack)).render([{"role": "user", "content": "Hi."}])


def test_code_of_a_model_is_not_asked_for_at_the_terminal(tmp_path, monkeypatch):
    """It is off, not asked: nobody answers `yes` by accident."""
    from transformers import AutoModelForCausalLM

    from trl.models.prepare import load_model, read_tokenizer

    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (tmp_path / "modeling.py").write_text(code)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["modeling.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(str(tmp_path), AutoModelForCausalLM)
    with pytest.raises(OSError, match="could not load a tokenizer"):
        read_tokenizer(str(tmp_path))
    assert asked == []


def test_the_command_says_which_rewards_are_code():
    from trl.scripts.data_config import GRPOScriptArguments
    from trl.scripts.describe import field_docs

    assert "file.py:function (both run that code)" in " ".join(field_docs(GRPOScriptArguments)["reward_funcs"].split())


def test_the_programs_of_its_page_run():
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    exec(compile(program, "security.md", "exec"), {})


def test_a_reward_of_images_cannot_end_the_run():
    """R4, variant: DDPO calls its reward function itself."""
    from trl.trainer.ddpo_trainer import DDPOTrainer

    def leave(*_):
        raise SystemExit(0)

    with pytest.raises(RuntimeError, match=r"reward_function asked the program to end: SystemExit\(0\)"):
        DDPOTrainer._score(SimpleNamespace(reward_fn=leave), ([], [], []))
