"""The command lines of today's documentation, and ours, on tiny local models."""

import json
import subprocess
import sys

import datasets
import pytest
from tokenizers_for_tests import word_tokenizer

from trl.cli.main import run
from trl.import_utils import is_bitsandbytes_available

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:You passed a model_id",
    "ignore:.*use_reentrant.*:UserWarning",
    "ignore:No solution could be read",
)
COMMON = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--save_strategy", "no"]
GROUP = ["--num_generations", "2", "--max_completion_length", "4"]
PAIR = {"prompt": "a b ", "chosen": "c d", "rejected": "e"}
ROWS = {
    "text": [{"text": "a b c"}, {"text": "b c d e"}],
    "pair": [PAIR],
    "label": [
        {"prompt": "a b ", "completion": "c d", "label": True},
        {"prompt": "b ", "completion": "e", "label": False},
    ],
    "prompt": [{"prompt": "a b", "solution": "$1$"}],
    "given": [{"prompt": "a b ", "completion": "c d"}],
    "steps": [{"prompt": "a b", "completions": ["c d", "e"], "labels": [True, False]}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a teacher, a reward model, and rows for every command."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    folder, tokenizer = tmp_path_factory.mktemp("lines"), word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "judge")
    for name in ("model", "judge"):
        tokenizer.save_pretrained(folder / name)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows * (8 // len(rows)))))
    texts = datasets.Dataset.from_list(ROWS["text"] * 4)
    datasets.DatasetDict({"train": texts, "test": texts.select(range(2))}).save_to_disk(folder / "splits")
    (folder / "mine.py").write_text("def count(completions, **columns):\n    return [len(c) for c in completions]\n")
    return folder


@pytest.fixture(autouse=True)
def there(place, tmp_path, monkeypatch):
    """Every line is typed in that folder."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def start(line, tmp_path):
    """The exit code of `trl LINE`, with what keeps it short."""
    words = line.split()
    return run([words[0], *COMMON, "--output_dir", str(tmp_path / "out"), *words[1:]])


MODEL = "--model_name_or_path model --dataset_name"
LINES = [
    f"sft {MODEL} text.jsonl",
    f"sft {MODEL} text.jsonl --dataset_train_split train --no_remove_unused_columns --warmup_ratio 0.5",
    f"sft {MODEL} text.jsonl --dtype bfloat16 --attn_implementation eager --trust_remote_code",
    f"sft {MODEL} splits --eval_strategy steps --eval_steps 1",
    f"sft {MODEL} text.jsonl --dataset_streaming --dtype auto --optim adamw_torch --lr_scheduler_type cosine",
    f"sft {MODEL} text.jsonl --use_peft --lora_r 4 --lora_alpha 8 --lora_target_modules q_proj v_proj",
    "sft --model model --data text.jsonl --packing --max_length 32",
    "sft --model model --data text.jsonl --eval-data text.jsonl --eval_strategy epoch --lora-rank 2",
    f"dpo {MODEL} pair.jsonl",
    f"dpo {MODEL} pair.jsonl --use_peft --lora_r 32 --lora_alpha 16",
    "dpo --model model --data pair.jsonl --loss_type sigmoid sft --loss_weights 1 0.2",
    f"reward {MODEL} pair.jsonl",
    f"reward {MODEL} pair.jsonl --use_peft --lora_r 4",
    f"kto {MODEL} label.jsonl --train_sampling_strategy random",
    f"orpo {MODEL} pair.jsonl",
    f"cpo {MODEL} pair.jsonl",
    f"simpo {MODEL} pair.jsonl",
    f"prm {MODEL} steps.jsonl",
    f"grpo {MODEL} prompt.jsonl --reward_funcs think_format_reward",
    f"grpo {MODEL} prompt.jsonl --reward_funcs mine.count --reward mine.py:count --reward_weights 1 0.5",
    f"grpo {MODEL} prompt.jsonl --reward-model-name-or-path judge --scale_rewards false",
    f"rloo {MODEL} prompt.jsonl --reward_funcs repetition get_soft_overlong_punishment --reward_clip_range -1 1",
    f"ppo {MODEL} prompt.jsonl --reward_funcs mine.count --response_length 4",
    f"ppo {MODEL} prompt.jsonl --reward-model-name-or-path judge --response_length 4 --use_peft --lora_r 4",
    f"raft {MODEL} prompt.jsonl --reward_funcs mine.count",
    f"online_dpo {MODEL} prompt.jsonl --reward_funcs mine.count",
    f"online-dpo {MODEL} prompt.jsonl --reward_funcs mine.count",
    f"distillation {MODEL} prompt.jsonl --teacher_model_name_or_path model",
    f"gkd {MODEL} given.jsonl --teacher_model_name_or_path model",
    f"gkd {MODEL} prompt.jsonl --teacher_model_name_or_path model --seq_kd --lmbda 0.5 "
    '--teacher_model_init_kwargs {"dtype":"float32"}',
    f"online_dpo {MODEL} prompt.jsonl --reward_model_path judge --beta 0.1 0.2 --missing_eos_penalty 1.0",
]


@pytest.mark.filterwarnings("ignore:[0-9,]+ trained weights are stored in bfloat16")
@pytest.mark.parametrize("line", LINES)
def test_a_line_trains(line, tmp_path, capsys):
    sampled = line.split()[0] in ("grpo", "rloo", "raft", "online_dpo", "online-dpo")
    more = " ".join(GROUP) if sampled else " ".join(GROUP[2:]) if line.startswith(("distillation", "gkd")) else ""
    assert start(f"{line} {more}", tmp_path) == 0, capsys.readouterr().err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" if "lora" in line else "model.safetensors") in names


def test_accuracy_by_todays_name(place, tmp_path):
    line = f"grpo {MODEL} prompt.jsonl --reward_funcs accuracy_reward {' '.join(GROUP)}"
    assert start(line, tmp_path) == 0


@pytest.fixture
def settings(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def arguments_of(tmp_path):
    import torch

    return torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)


@pytest.mark.parametrize(
    "names", [("model_name_or_path", "dataset_name"), ("model", "data"), ("model-name-or-path", "dataset-name")]
)
def test_yaml_with_either_name(names, settings, tmp_path):
    path = settings(f"{names[0]}: model\n{names[1]}: text.jsonl\nlearning_rate: 1e-3\nuse_peft: true\nlora_r: 2\n")
    assert start(f"sft --config {path}", tmp_path) == 0
    assert arguments_of(tmp_path).learning_rate == 1e-3


def test_the_line_wins_whatever_a_setting_is_called(settings, tmp_path):
    path = settings("model: nowhere\ndata: nowhere.jsonl\nlearning_rate: 1e-3\nlora_rank: 4\noutput_dir: elsewhere\n")
    words = f"sft --config {path} --model_name_or_path model --data text.jsonl --learning-rate 1e-4 --lora_r 2"
    assert start(words, tmp_path) == 0
    assert arguments_of(tmp_path).learning_rate == 1e-4
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (2, 4, "CAUSAL_LM")


def test_the_line_says_which_data(settings, tmp_path):
    path = settings("model: model\ndatasets: [nowhere.jsonl]\n")
    assert start(f"sft --config {path} --data text.jsonl", tmp_path) == 0
    path = settings("model: model\ndata: nowhere.jsonl\n")
    assert start(f"sft --config {path} --datasets text.jsonl splits", tmp_path) == 0


def test_rewards_of_a_file(settings, tmp_path):
    path = settings("model: model\ndata: prompt.jsonl\nrewards: [mine.count, repetition]\nreward_weights: [1, 0.5]\n")
    assert start(f"grpo --config {path} {' '.join(GROUP)}", tmp_path) == 0


def test_what_has_no_effect_says_so(tmp_path, capsys):
    line = f"sft {MODEL} text.jsonl --lora_r 4 --bnb_4bit_quant_type fp4 --eval-data text.jsonl"
    assert start(line, tmp_path) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: lora_r: no effect without --use_peft",
        "note: bnb_4bit_quant_type: no effect without --load_in_4bit",
        "note: eval_data: no effect without --eval_strategy",
    ]


@pytest.mark.parametrize(("words", "rate"), [("", 2e-4), ("--learning_rate 3e-5", 3e-5)])
def test_an_adapter_takes_an_adapters_rate(words, rate, tmp_path, capsys):
    assert start(f"sft {MODEL} text.jsonl --use_peft --lora_r 2 {words}", tmp_path) == 0
    assert arguments_of(tmp_path).learning_rate == rate
    assert ("note: learning_rate=0.0002, as an adapter" in capsys.readouterr().err) == (rate == 2e-4)


def test_a_mixture_and_the_environment(settings, tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = settings(
        "model_name_or_path: model\nenv:\n  TRL_TEST: 7\ndatasets:\n"
        "  - path: json\n    data_files: text.jsonl\n  - path: json\n    data_files: text.jsonl\n    columns: [text]\n"
    )
    assert start(f"sft --config {path}", tmp_path) == 0
    assert os.environ["TRL_TEST"] == "7"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"sft {MODEL} text.jsonl --lerning_rate 1",
            "lerning_rate: SFTConfig has no such field; did you mean learning_rate?",
        ),
        (f"sft {MODEL} text.jsonl --learning_rate fast", "--learning_rate='fast': give a number"),
        (f"sft {MODEL} text.jsonl --max_length 2.5", "--max_length='2.5': give a whole number"),
        (
            f"sft {MODEL} text.jsonl --eval_strategy sometimes",
            "--eval_strategy='sometimes': give one of no, steps, epoch",
        ),
        (f"sft {MODEL} text.jsonl --packing perhaps", "--packing='perhaps': give true or false"),
        (f"sft {MODEL} text.jsonl --learning_rate", "--learning_rate"),
        (f"sft {MODEL} text.jsonl nonsense", "'nonsense': expected --setting before it"),
        (f"sft {MODEL} text.jsonl --lora_rank 2 --lora_r 3", "two names of one setting"),
        (f"sft {MODEL} text.jsonl --lora_rank 0", "lora_rank=0: give a rank >= 1"),
        (f"sft {MODEL} splits --dataset_train_split all", "--dataset_train_split all: the data set has no such split"),
        (f"sft {MODEL} text.jsonl --datasets text.jsonl", "two answers to one question"),
        (f"sft {MODEL} text.jsonl --load_in_4bit --load_in_8bit", "choose one of them"),
        (f"sft {MODEL} text.jsonl --config", "there is no such file"),
        (f"grpo {MODEL} prompt.jsonl --reward_funcs nothing_reward", "nothing_reward"),
        (f"grpo {MODEL} prompt.jsonl --reward_funcs mine.nothing", "mine:nothing"),
        (
            f"sft {MODEL} text.jsonl --num_processes 2 --accelerate_config zero9",
            "choose one of ddp, ddp_nodes, fsdp2",
        ),
        (f"sft {MODEL} text.jsonl --num_processes many", "--num_processes='many': give a whole number"),
        ("schema train", "choose one of sft, reward"),
    ],
)
def test_an_error_is_one_line_that_names_the_setting(line, message, capsys):
    assert run(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "lerning_rate: SFTConfig has no such field; did you mean learning_rate?"),
        ("learning_rate: fast\n", "learning_rate='fast': give a number"),
        ("lora_dropout: [1]\n", "lora_dropout=[1]: give a number"),
        ("model: m\ndata: nowhere.jsonl\nlora_rank: null\n", "nowhere.jsonl: there is no such file"),
        ("model: a\nmodel_name_or_path: b\n", "the file gives model_name_or_path twice"),
        ("- a\n", "give one `setting: value` a line"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, settings, capsys):
    assert run(["sft", "--config", settings(text)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
def test_quantisation_says_which_package_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: True)
    assert start(f"sft {MODEL} text.jsonl --load_in_4bit --use_peft", tmp_path) == 2
    assert "bitsandbytes" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["sft", "grpo", "distillation"])
def test_help_shows_types_defaults_an_example_and_the_common_settings_first(name, capsys):
    for words in ([name, "--help"], [name, "--learning_rate", "1", "-h"]):
        assert run(words) == 0
    text = capsys.readouterr().out
    assert f"trl {name} --model_name_or_path" in text
    assert "a number" in text
    assert text.index("\n--output_dir ") < text.index("\n--learning_rate ") < text.index("Further settings of")
    assert text.index("Further settings of") < text.index("adam_beta1")
    assert ("--reward_funcs accuracy_reward" in text) == (name == "grpo")


def test_fields_have_all_of_them(capsys):
    assert run(["sft", "--fields"]) == 0
    text = capsys.readouterr().out
    assert text.index("--max_length") < text.index("--adam_beta1")


def test_the_schema_knows_every_setting(capsys):
    assert run(["schema", "dpo"]) == 0
    schema = json.loads(capsys.readouterr().out)
    known = schema["properties"]
    assert {"model_name_or_path", "model", "data", "datasets", "env", "num_processes", "loss_type"} <= set(known)
    assert known["learning_rate"]["type"] == "number"
    assert known["learning_rate"]["default"] == 1e-6
    assert known["eval_strategy"]["enum"] == ["no", "steps", "epoch"]
    assert known["beta"]["description"]
    assert known["datasets"]["items"]["required"] == ["path"]
    assert schema["additionalProperties"] is False


def test_version_and_environment(capsys):
    import trl

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"{trl.__version__}\n"
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    assert f"- TRL version: {trl.__version__}" in text
    assert "- torch version: " in text


@pytest.mark.parametrize(
    "words",
    [["-m", "trl", "--version"], ["-m", "trl.scripts.env"], ["-m", "trl.scripts.sft", "--fields"]],
)
def test_runnable_modules(words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto", "grpo", "rloo"])
def test_every_official_script_is_a_module(name, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["script", "--no_such_setting", "1"])
    monkeypatch.delitem(sys.modules, f"trl.scripts.{name}", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"trl.scripts.{name}", run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: no_such_setting: ")


def test_a_runnable_module_trains(place, tmp_path, monkeypatch, capsys):
    from trl.scripts.training import run_script

    words = [*MODEL.split(), "text.jsonl", *COMMON, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    with pytest.raises(SystemExit) as left:
        run_script("sft")
    assert left.value.code == 0
    assert "saved to" in capsys.readouterr().out
