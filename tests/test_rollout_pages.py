"""Every program of docs/environments.md and docs/on_policy.md runs as it stands, on tiny models."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fake_vllm import FakeVLLM
from tiny_models import tiny_model
from tokenizers_for_tests import TOOLS, byte_tokenizer

import trl
from trl.cli.main import run
from trl.environment.tools import SimpleCalculatorTool

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:No dataset is provided")
PAGES = Path(__file__).parents[1] / "docs"
SHORTER = {
    "num_generations=8)": "num_generations=8, max_completion_length=4, max_steps=1, use_cpu=True)",
    "max_steps=100)": "per_device_train_batch_size=4, num_generations=2, max_completion_length=8, max_steps=1)",
}
"""what is changed in the programs: how long they run"""


def programs(page):
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


def tokens():
    return byte_tokenizer(TOOLS)


def model(names):
    end = names.convert_tokens_to_ids("<|im_end|>")
    return tiny_model("llama", vocab_size=len(names), max_position_embeddings=1024, eos_token_id=end)


def talks(**columns):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Find it.", "Go on.")]
    more = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Dataset.from_list([row | own for row, own in zip(rows, more, strict=True)])


class Trained(trl.GRPOTrainer):
    """A trainer that has trained when it is there."""

    runs = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train()

    def train(self, *args, **kwargs):
        type(self).runs += self.state.global_step == 0
        return super().train(*args, **kwargs) if self.state.global_step == 0 else None


def settings(folder):
    shape = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "max_steps": 1}
    return trl.GRPOConfig(str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **shape)


def perform(program, known):
    for words, shorter in SHORTER.items():
        program = program.replace(words, shorter)
    exec(compile(program, "page", "exec"), known)


def rewards(responses, answers=None, **columns):
    return [float(len(response)) for response in responses]


def old_loop(names):
    policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model(names))
    ppo = trl.PPOTrainer(trl.PPOConfig(batch_size=2, mini_batch_size=1), policy, tokenizer=names)
    texts, answers = ["13-3: ", "2+2: "], ["10", "4"]
    return {"model": policy, "ppo_trainer": ppo, "prompt": "Sums.\n", "texts": texts, "answers": answers}


def test_environments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = tokens()
    known = {
        "TextEnvironment": trl.TextEnvironment, "SimpleCalculatorTool": SimpleCalculatorTool, "torch": torch,
        "random": random, "GRPOConfig": trl.GRPOConfig, "GRPOTrainer": Trained, "tokenizer": names,
        "reward_fn": rewards,
    }  # fmt: skip
    blocks = programs("environments.md")
    numbers, kinds = [3, 5], ["guess", "sum"]
    given = [
        lambda: old_loop(names), lambda: {"rows": [{"prompt": "13-3: "}, {"prompt": "2+2: "}]},
        lambda: {"rows": talks(number=numbers)}, dict, lambda: {"rows": talks(number=numbers, environment=kinds)},
    ]  # fmt: skip
    for number, (block, own) in enumerate(zip(blocks, given, strict=True)):
        known |= {"model": model(names), "config": settings(f"run-{number}")}
        known |= own()
        perform(block, known)  # classes of earlier programs are known to later ones
    assert Trained.runs == 4


def test_on_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, prompts = byte_tokenizer(), Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    names.save_pretrained("my-model")
    tiny_model("llama", vocab_size=len(names)).save_pretrained("my-model")

    def complete(prompt):
        ids, logprobs = [70, 71], [-1.0, -2.0]
        return SimpleNamespace(prompt_ids=names(prompt).input_ids, ids=ids, logprobs=logprobs, solved=prompt == "a")

    known = {"prompts": prompts, "engine": SimpleNamespace(complete=complete)}
    first, judge, suspected, counting, second = programs("on_policy.md")
    perform(first, known)
    assert list(Path("run").glob("checkpoint-*"))
    perform(judge, known)
    assert (known["judge"].low, known["judge"].high) == (1, 5)
    perform(suspected, known)
    assert Path("long/reward_check.json").is_file()
    perform(counting, known | {"model": tiny_model("llama", vocab_size=len(names)), "tokenizer": names})
    perform(second, known)
    made = known["rollout_func"]
    trainer = trl.GRPOTrainer(
        "my-model", lambda solved, completions: solved, settings("own"), prompts, rollout_func=made
    )
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 0.5


def test_vllm(tmp_path, monkeypatch):
    """With a server that speaks vLLM's protocol; `trl vllm-serve` is asked what it would start."""
    monkeypatch.chdir(tmp_path)
    names, prompts = byte_tokenizer(), Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    names.save_pretrained("my-model")
    policy = tiny_model("llama", vocab_size=len(names))
    policy.save_pretrained("my-model")
    (serve,) = re.findall(r"^trl (.*)$", (PAGES / "vllm.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert run([*serve.split(), "--dry-run"]) == 0
    first, ahead, second = programs("vllm.md")
    with FakeVLLM(tiny_model("llama", vocab_size=len(names)), names) as server:
        here = lambda program: program.replace("http://127.0.0.1:8000", server.url)  # noqa: E731
        known = {"prompts": prompts, "reward": lambda completions, **rest: [float(len(text)) for text in completions]}
        perform(here(first), known)
        assert known["trainer"].sampler.version == 0
        perform(ahead, known)
        assert known["config"].max_staleness == 1
        headed = trl.AutoModelForCausalLMWithValueHead.from_pretrained(policy)
        known = {"model": headed, "tokenizer": names, "query": torch.tensor([70, 71])}
        perform(here(second), known)
        assert server.version == "policy-1"
    assert 1 <= len(known["response"]) <= 8
