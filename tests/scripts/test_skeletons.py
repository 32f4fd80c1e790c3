"""Short scripts as users of every release wrote them: names, keywords, call orders and command lines run unchanged."""

import os
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState

SKELETONS = sorted((Path(__file__).parent / "skeletons").glob("*.py"))

NOT_YET: dict[str, str] = {}
"""scripts that fail today, with the first line of today's error: whoever mends one takes it out"""

NAMED = r"(ImportError|ModuleNotFoundError): (?!cannot import name|No module named)"
"""an ImportError with a text of its own, not Python's"""
RAISES: dict[str, str] = {
    "v08_nash_md": NAMED + r".*NashMD.*(OnlineDPO|GRPO)",
    "v12_grpo_own_loss": r"(?!AssertionError)\w+: .*_compute_loss",
    "v12_sft_own_loss_default": r"\w+Error: .*padding_free=False",
    "v1_nash_md": NAMED + r".*(NashMD|nash_md).*(OnlineDPO|GRPO)",
    "v1_tpo": NAMED + r".*(TPO|tpo).*(CPO|DPO|SimPO)",
    "v1_weave": NAMED + r".*[Ww]eave",
    "v1_xpo": NAMED + r".*(XPO|xpo).*(OnlineDPO|GRPO)",
}
"""scripts whose right outcome is an error that names the way out: what it has to match, as `Type: text`"""

SUBJECTS = (
    "parsers", "command line", "names and modules", "older trainers", "callbacks, chat and rewards", "overrides",
    "settings",
)  # fmt: skip
"""what a skeleton is mainly about"""

ROWS = """
ModelConfig; get_peft_config; ScriptArguments; get_quantization_config; option --no_remove_unused_columns; TrlParser;
trainer argument quantization_config; parse:GRPO family; LogCompletionsCallback; DatasetMixtureConfig;
field trust_remote_code; get_dataset; PPO of 0.12+; get_kbit_device_map; SIMPLE_CHAT_TEMPLATE; setup_chat_format;
trl.commands.cli_utils; trl.experimental.ppo; RichProgressCallback; parse:DPOConfig.loss_type; GKDConfig.max_new_tokens;
teacher given by both argument and config; trl.experimental.gkd; OnlineDPOConfig.max_new_tokens;
OnlineDPOConfig.reward_model_path; SFTConfig.activation_offloading; use_vllm=True; SFTConfig.max_seq_length;
0.8 style packing=True on messages; trl.experimental.cpo; trl.experimental.orpo; trainer BCO; trl.experimental.bco;
trainer TPO; trl.experimental.tpo; DistillationConfig.teacher_model_revision; trl.experimental.distillation;
GRPOConfig.vllm_enable_sleep_mode; GRPOConfig.vllm_mode; RLOOConfig.vllm_gpu_memory_utilization; RLOOConfig.vllm_mode;
trl.experimental.online_dpo; trainer NashMD; trl.experimental.nash_md; trainer XPO; trl.experimental.xpo;
trl.experimental.prm; SFTConfig.chat_template_path of a folder; BEMACallback; SyncRefModelCallback; WeaveCallback;
clone_chat_template; trl.chat_template_utils; get_cosine_scaled_reward; get_repetition_penalty_reward;
GRPOConfig.cast_lm_head_to_fp32; loss_type luspo, vespo, sigmoid_norm, chunked_nll; GRPOConfig.use_transformers_paged;
SFTConfig.use_mps_device; DPOConfig.warmup_ratio; GRPOConfig.warmup_ratio; SFTConfig.warmup_ratio;
KTOConfig.warmup_ratio; IterativeSFTConfig; PPOv2Config; PPOv2Trainer;
RLOO of 0.9-0.16 (config=, policy=, reward_model=); DPOScriptArguments; OnlineDPOTrainer(reward_model=);
GKDConfig.seq_kd; metric eval_mean_token_accuracy; compute_loss(model, inputs) on model(**inputs)
"""
"""what 114 real scripts needed beyond what ran"""


def parts_of(script: Path) -> tuple[str, list[str], list[str]]:
    """The first line of a skeleton, the rows that it holds, and its command line."""
    text = script.read_text(encoding="utf-8").split('"""')[1]
    first, *paragraphs = text.split("\n\n")
    rows, *run = (" ".join(paragraph.split()) for paragraph in paragraphs)
    line = shlex.split(run[0])[3:] if run else []
    return first, rows.removeprefix("Rows: ").removesuffix(".").split("; "), line


def error_of(script: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a skeleton as `__main__`; its error as `Type: text` on one line, empty where there is none."""
    sys.argv = [str(script), *parts_of(script)[2]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # a script may warn its user
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:  # a command line was refused: the reason is the last line that it wrote
        if end.code == 0:
            return ""
        return f"SystemExit: {[str(end.code), *capsys.readouterr().err.splitlines()][-1].strip()}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in; what a script leaves in the process is put back."""
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.slow
@pytest.mark.parametrize("script", SKELETONS, ids=lambda path: path.stem)
def test_runs_unchanged(script, place, capsys):
    error = error_of(script, capsys)
    if script.stem in NOT_YET:
        assert error, f"{script.stem} runs now: take it out of NOT_YET"
        if script.stem in RAISES:
            right = re.match(RAISES[script.stem], error)
            assert not right, f"{script.stem} raises the right error now: take it out of NOT_YET"
    elif script.stem in RAISES:
        assert re.match(RAISES[script.stem], error), error or "no error"
    else:
        assert error == ""


def test_first_lines_say_release_kind_and_subject():
    kinds = "official example|documentation|course|third party"
    subjects = "|".join(SUBJECTS)
    for script in SKELETONS:
        assert re.fullmatch(rf"Release [\d.x-]+, ({kinds}): ({subjects})\.", parts_of(script)[0]), script.stem


def test_every_row_has_a_skeleton():
    held = {row for script in SKELETONS for row in parts_of(script)[1]} - {"none"}
    wanted = set(" ".join(ROWS.split()).split("; "))
    assert held == wanted


def test_tables_name_skeletons():
    assert set(NOT_YET) | set(RAISES) <= {script.stem for script in SKELETONS}
