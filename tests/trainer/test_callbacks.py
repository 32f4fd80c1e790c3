"""Callbacks that scripts add: completions, progress, moving references, averages of the weights."""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conformity import causal_lm, pairs, texts, tokenizer
from datasets import Dataset
from dpo_cases import PLAIN, config, trainer_of
from tokenizers_for_tests import CHATML, byte_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from trl import (
    BEMACallback,
    LogCompletionsCallback,
    RichProgressCallback,
    SFTConfig,
    SFTTrainer,
    SyncRefModelCallback,
)
from trl.trainer.callbacks import NotebookColumns, prompts_of
from trl.trainer.step_line import (
    Advice,
    Clock,
    duration,
    folded,
    follows,
    last_line,
    narrowed,
    read,
    short,
    training_line,
)

# -- the reference moves ----------------------------------------------------------------------


def test_a_reference_follows_by_hand():
    policy, reference = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    policy.weight.data.fill_(10.0)
    reference.weight.data.fill_(0.0)
    callback = SyncRefModelCallback(reference)
    args = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.3)
    seen = []
    for step in range(1, 5):
        callback.on_step_end(args, TrainerState(global_step=step), TrainerControl(), model=policy)
        seen.append(reference.weight.item())
    assert seen == pytest.approx([0, 3, 3, 3 + 0.3 * 7])
    assert not reference.weight.requires_grad
    with pytest.raises(ValueError, match="ref_model: None cannot move"):
        SyncRefModelCallback(None)
    with pytest.raises(ValueError, match="ref_model_sync_steps: SyncRefModelCallback reads it from the config"):
        callback.on_step_end(SimpleNamespace(), TrainerState(), TrainerControl(), model=policy)


def test_the_callback_does_what_the_setting_does(tmp_path):
    asked = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 3}
    by_setting = trainer_of(config(tmp_path, sync_ref_model=True, **asked))
    by_callback = trainer_of(config(tmp_path, **asked))
    by_callback.add_callback(SyncRefModelCallback(by_callback.ref_model, by_callback.accelerator))
    for trainer in (by_setting, by_callback):
        trainer.train()
        assert "reference" in trainer.extra_state()  # a checkpoint holds what has moved
    moved = by_callback.ref_model.state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in by_setting.ref_model.state_dict().items())


# -- averages ---------------------------------------------------------------------------------


def test_bema_by_hand(tmp_path):
    """lag 1, multiplier 3: ages 1 + 3 t. Both powers 1/2; weights 0, then 4, 8, ... at steps 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False)
    callback = BEMACallback(update_freq=1, ema_power=0.5, bias_power=0.5, lag=1, multiplier=3.0)
    model.weight.data.zero_()
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    average = 0.0
    for step in (1, 2, 3):
        model.weight.data.fill_(4.0 * step)
        callback.on_step_end(None, TrainerState(global_step=step), TrainerControl(), model=model)
        share = (1 + 3 * step) ** -0.5
        average += share * (4 * step - average)
        assert float(callback.weights["weight"]) == pytest.approx(average + share * 4 * step)
    assert average == pytest.approx(2 + 6 / 7**0.5 + (12 - 2 - 6 / 7**0.5) / 10**0.5)  # the first share is 1/2
    with callback.averaged(model):
        assert model.weight.item() == pytest.approx(float(callback.weights["weight"]))
    assert model.weight.item() == 12


def run_bema(weights, **settings):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    callback = BEMACallback(**settings)
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    for step, weight in enumerate(weights, start=1):
        model.weight.data.fill_(weight)
        callback.on_step_end(None, TrainerState(global_step=step), TrainerControl(), model=model)
    return float(callback.weights["weight"])


def test_bema_s_settings():
    assert run_bema([5.0, 7.0], update_freq=1, ema_power=0.0, bias_power=0.0) == 7  # each share is 1: no average
    assert run_bema([5.0, 7.0], update_freq=3) == 0  # no update yet
    assert run_bema([5.0, 7.0], update_freq=1, update_after=2) == 7  # training has begun to count there
    assert run_bema([5.0], update_freq=1, ema_power=9.0, bias_power=0.0, min_ema_multiplier=0.5) == 2.5
    frozen = nn.Linear(1, 1).requires_grad_(False)
    callback = BEMACallback()
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=frozen)
    assert callback.weights == {}
    for wrong, words in (({"update_freq": 0}, "update_freq=0"), ({"lag": 0, "multiplier": 0.0}, "lag=0, multiplier=0")):
        with pytest.raises(ValueError, match=words):
            BEMACallback(**wrong)


def test_bema_is_saved(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **PLAIN | {"max_steps": 2})
    callback = BEMACallback(update_freq=1)
    model = causal_lm()
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=tokenizer(), callbacks=[callback])
    trainer.train()
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "bema").named_parameters())
    assert (tmp_path / "bema" / "tokenizer_config.json").exists()
    assert all(torch.allclose(saved[name], value) for name, value in callback.weights.items())
    own = dict(model.named_parameters())
    assert any(not torch.equal(saved[name], value) for name, value in own.items())


# -- completions ------------------------------------------------------------------------------

GREEDY = GenerationConfig(max_new_tokens=3, do_sample=False)


def test_completions_of_evaluation_prompts(tmp_path, capsys):
    trainer = trainer_of(config(tmp_path, max_steps=4, report_to="none"), eval_dataset=pairs())
    callback = LogCompletionsCallback(trainer, GREEDY, num_prompts=2, freq=2)
    trainer.add_callback(callback)
    trainer.train()
    assert [row[0] for row in callback.table] == [2, 2, 4, 4]
    assert [row[1] for row in callback.table[:2]] == [prompt.strip() for prompt in pairs()["prompt"][:2]]
    ids = torch.tensor([trainer.eval_dataset[1]["prompt_ids"]])
    with torch.no_grad():
        own = trainer.model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)
    text = tokenizer().decode(own[0, ids.shape[1] :], skip_special_tokens=True)
    assert callback.table[3][2] == text
    assert "completions" in capsys.readouterr().out


def test_completions_change_nothing_else(tmp_path):
    def weights(log):
        trainer = trainer_of(config(tmp_path, max_steps=2), eval_dataset=pairs())
        if log:
            trainer.add_callback(LogCompletionsCallback(trainer, num_prompts=1, freq=1))
        trainer.train()
        return trainer.model.state_dict()

    with_log = weights(True)
    assert all(torch.equal(value, with_log[name]) for name, value in weights(False).items())


def test_completions_where_they_cannot_be(tmp_path):
    trainer = trainer_of(config(tmp_path))
    with pytest.raises(ValueError, match="it has no eval_dataset"):
        LogCompletionsCallback(trainer)
    trainer = trainer_of(config(tmp_path), eval_dataset=pairs())
    with pytest.raises(ValueError, match="num_prompts=0"):
        LogCompletionsCallback(trainer, num_prompts=0)
    trainer.add_callback(LogCompletionsCallback(trainer))
    with pytest.raises(ValueError, match="freq=None: the config has no eval_steps"):
        trainer.train()
    trainer = trainer_of(config(tmp_path), eval_dataset=pairs())
    trainer.add_callback(LogCompletionsCallback(trainer, GenerationConfig(num_beams=2), freq=1))
    with pytest.raises(ValueError, match="generation_config: a setting of it is none of sampling"):
        trainer.train()


def test_prompts_of_rows():
    words = tokenizer()
    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}, {"prompt_ids": [4, 5]}, {"prompt": "a b"}]
    assert prompts_of(rows, words, None) == [[5, 6], [4, 5], words("a b")["input_ids"]]
    assert prompts_of({"first": rows[1:]}, words, 1) == [[4, 5]]
    chat = byte_tokenizer(CHATML)
    talk = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    (ids,) = prompts_of(talk, chat, None)
    assert chat.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"eval_dataset: a row with the columns .*'loss_mask'.* has no prompt"):
        prompts_of([{"input_ids": [5, 6], "loss_mask": [0, 1]}], words, None)


# -- progress ---------------------------------------------------------------------------------


def shown_by(tmp_path, **settings):
    asked = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1} | settings
    trainer = trainer_of(config(tmp_path, **asked), eval_dataset=pairs(), callbacks=[RichProgressCallback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def test_lines_without_a_terminal(tmp_path, capsys):
    shown_by(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    kinds = [re.sub(r"[-\d.,e]+ ?", "0 ", line) for line in lines]
    first, last = "accuracy 0 · margin 0 · loss 0 · lr 0 · 0 tok/s · 0 ", "accuracy 0 · margin 0 · loss 0 "
    assert lines[0].startswith("step 1/2 · ")
    assert lines[0].endswith(" left")
    assert first in kinds[0]
    assert lines[1].startswith("evaluation after step 1 · ")
    assert last in kinds[1]
    assert lines[2].startswith("step 2/2 · ")
    assert lines[4].startswith("trained 2 steps in 0:0")
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("bars", [True, False])
def test_bars_in_a_terminal(bars, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown_by(tmp_path, disable_tqdm=not bars)
    shown = capsys.readouterr().out
    assert ("2/2\x1b" in shown) == ("training" in shown) == bars
    assert "step 2/2 · accuracy" in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert bool(re.search(r"0/2 --:-- left .*evaluation at 1", plain)) == bars
    assert bool(re.search(r"1/2 \S+ left \d+(\.\d)? [GM]iB +evaluation at 2", plain)) == bars
    ours = [line for line in re.split("[\r\n]", plain) if line.lstrip("\x1b[2K").startswith(("training", "step"))]
    assert ours
    assert max(len(line.replace("\x1b[2K", "")) for line in ours) <= 80


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_bars_go_after_an_error(error, tmp_path, capsys, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise error

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    trainer = trainer_of(config(tmp_path, max_steps=2, disable_tqdm=False), callbacks=[RichProgressCallback, Stop])
    with pytest.raises(error):
        trainer.train()
    shown = capsys.readouterr().out
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2.3149, "2.31"), (8e-6, "8e-6"), (1.24e-5, "1.2e-5"), (1920.4, "1,920"), (0.0, "0"), (-0.0712, "-0.0712"),
        (float("nan"), "nan"), (7, "7"), (1e9, "1,000,000,000"), (0.5, "0.5"), (-3e-7, "-3e-7"),
    ],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(250, "4:10"), (3723.4, "1:02:03"), (0.2, "0:00"), (-1, "0:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("trl.trainer.step_line.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("trl.trainer.step_line.peak_memory", lambda: 1.3 * 2**30)
    monkeypatch.setattr("trl.trainer.step_line.peak_device_memory", lambda: None)
    clock = Clock(10, 300, 1000)
    now[0] += 20
    clock.pause(10.0)
    logs = {"loss": 2.3149, "grad_norm": 1.0, "learning_rate": 8e-6, "num_tokens": 20200.0, "epoch": 1.0}
    assert training_line(20, logs, clock) == ("step 20/300 · loss 2.31 · lr 8e-6 · 1,920 tok/s · 1.3 GiB · 4:40 left")
    logs = {"reward": 0.312, "reward_std": 0.1, "kl": 0.02, "completions/mean_length": 143.2, "loss": float("nan"),
            "completions/clipped_ratio": 0.125, "num_tokens": 20200.0}  # fmt: skip
    assert training_line(300, logs, clock) == (
        "step 300/300 · reward 0.312 ± 0.1 · KL 0.02 · length 143 · 12% cut · loss nan · 1.3 GiB"
    )
    assert training_line(30, {"objective/x": 0.5}, clock).startswith("step 30/300 · objective/x 0.5 · ")


def test_a_line_is_folded_between_its_parts():
    line = "step 2/2 · reward 0.5 ± 0.577 · length 4 · lr 5e-7 · 2,603 tok/s"
    assert folded(line, 66) == line
    assert folded(line, 40).split("\n") == ["step 2/2 · reward 0.5 ± 0.577 · length 4", "  lr 5e-7 · 2,603 tok/s"]
    assert folded(line, 5).split("\n") == [
        "step 2/2",
        "  reward 0.5 ± 0.577",
        "  length 4",
        "  lr 5e-7",
        "  2,603 tok/s",
    ]
    assert folded("note: one part", 5) == "note: one part"


def test_what_the_bar_shows_is_left_out_of_a_line_that_is_too_wide():
    line = "step 5/25 · loss 0.663 · 96 tok/s · 1.5 GiB · 1:13 left"
    assert narrowed(line, len(line)) == line
    assert narrowed(line, len(line) - 1) == "step 5/25 · loss 0.663 · 96 tok/s · 1.5 GiB"
    assert narrowed(line, 10) == "step 5/25 · loss 0.663 · 96 tok/s"  # the rest is folded
    assert narrowed("step 25/25 · loss 0.489 · 240 MiB", 30) == "step 25/25 · loss 0.489"


@pytest.mark.parametrize(
    ("first", "step", "line"),
    [
        (0, 25, "trained 25 steps in 1:29 · mean loss 0.559 · 1.5 GiB"),
        (4, 6, "trained 2 steps, to step 6, in 1:29 · mean loss 0.559 · 1.5 GiB"),
        (6, 6, "trained nothing: the run is at step 6"),
    ],
)
def test_the_last_line_counts_the_steps_of_this_part(first, step, line, monkeypatch):
    monkeypatch.setattr("trl.trainer.step_line.peak_memory", lambda: 1.5 * 2**30)
    monkeypatch.setattr("trl.trainer.step_line.peak_device_memory", lambda: None)
    assert last_line(step, {"train_runtime": 89.2, "train_loss": 0.5592}, first) == line


@pytest.mark.parametrize(
    ("step", "settings", "text"),
    [
        (0, {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}, "evaluation at 2"),
        (2, {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 3}, "checkpoint at 3"),
        (3, {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}, "evaluation at 4"),
        (1, {"save_steps": 500}, "checkpoint at 5"),
        (5, {"save_steps": 500}, ""),
        (1, {"save_strategy": "no"}, ""),
        (1, {"save_strategy": "epoch"}, ""),
    ],
)
def test_what_follows(step, settings, text):
    args = SFTConfig(report_to="none", **settings)
    state = TrainerState(global_step=step, max_steps=5)
    state.compute_steps(args, 5)
    assert follows(args, state) == text


def test_a_reward_is_said_once():
    assert dict(read({"reward": 0.5, "objective/scores": 0.5, "loss": 1.0})) == {"reward": "0.5", "loss": "1"}
    assert dict(read({"objective/scores": 0.5})) == {"score": "0.5"}


def test_advice_is_given_once():
    advice, cut = Advice(), {"completions/clipped_ratio": 0.9, "frac_reward_zero_std": 0.1, "loss": 1.0}
    assert list(advice.of(cut)) == []  # once is chance
    assert list(advice.of(cut)) == [
        "note: completions/clipped_ratio 0.9: the limit cuts completions before they end; raise max_completion_length, "
        "or reward shorter ones"
    ]
    assert [line for _ in range(5) for line in advice.of(cut)] == []
    idle = {"frac_reward_zero_std": 0.8}
    assert [*advice.of(idle), *advice.of({"frac_reward_zero_std": 0.2}), *advice.of(idle)] == []


@pytest.fixture
def notebook(monkeypatch):
    """transformers' notebook module, with a display that keeps what is shown."""
    shown = []
    handle = SimpleNamespace(update=shown.append)
    display = SimpleNamespace(HTML=str, display=lambda html, display_id=False: shown.append(html) or handle)
    for name, module in (("IPython", SimpleNamespace(display=display)), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    module = importlib.import_module("transformers.utils.notebook")
    yield SimpleNamespace(callback=module.NotebookProgressCallback, shown=shown)
    sys.modules.pop("transformers.utils.notebook", None)


def table_of(notebook, strategy, *logged):
    """The last table of a run with these logs; evaluations are those with a runtime."""
    args, state = SFTConfig(report_to="none", eval_strategy=strategy), TrainerState(max_steps=4, epoch=0.5)
    theirs = notebook.callback()
    ours = NotebookColumns(theirs)

    def call(event, **more):
        for callback in (theirs, ours):
            getattr(callback, event)(args, state, TrainerControl(), **more)

    call("on_train_begin")
    for step, logs in logged:
        if step > state.global_step:
            state.global_step = step
            call("on_step_end")
        call("on_log", logs=logs)
        if "eval_runtime" in logs:
            call("on_evaluate", metrics=dict(logs))
    rows, last = theirs.training_tracker.inner_table, notebook.shown
    state.global_step = state.max_steps + 1
    call("on_train_end")
    assert all(f"<td>{cell}</td>" in last[-1] for row in rows[1:] for cell in row)
    return rows


ON_POLICY = {"loss": 1e-8, "reward": 2.0, "reward_std": 0.5, "kl": 0.0123, "completions/mean_length": 7.0}


def test_a_notebooks_table_shows_more_than_the_loss(notebook):
    """L13"""
    assert table_of(
        notebook, "no", (3, ON_POLICY | {"learning_rate": 1e-6}), (4, {"loss": 0.25}), (4, {"train_runtime": 1})
    ) == [
        ["Step", "Reward", "KL", "Length", "Training Loss", "Learning Rate"],
        [3, "2 ± 0.5", "0.0123", "7", "1e-8", "1e-6"],
        [4, "", "", "", "0.25", ""],
    ]
    pairs = {"loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.01}
    assert table_of(notebook, "no", (1, pairs)) == [
        ["Step", "Accuracy", "Margin", "Training Loss"], [1, "0.5", "0.01", "0.693"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "first", "cells"), [("steps", "Step", [1, 2]), ("epoch", "Epoch", ["0.5", "0.5"])]
)
def test_a_notebooks_table_shows_evaluations(strategy, first, cells, notebook):
    """L13: in columns of their own, whatever a user's metrics are called."""
    found = {"eval_loss": 0.5, "eval_reward": 1.0, "eval_mine": 3, "eval_runtime": 2.0, "eval_num_tokens": 9.0}
    assert table_of(notebook, strategy, (1, {"loss": 0.75}), (2, ON_POLICY), (2, found)) == [
        [first, "Training Loss", "Reward", "KL", "Length", "Validation Reward", "Validation Loss", "Validation Mine"],
        [cells[0], "0.75", "", "", "", "", "", ""],
        [cells[1], "1e-8", "2 ± 0.5", "0.0123", "7", "1", "0.5", "3"],
    ]


def test_every_trainer_fills_a_notebooks_table(notebook, tmp_path, monkeypatch):
    """L13"""
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.callback)
    trainer = trainer_of(config(tmp_path, max_steps=2, logging_steps=1, disable_tqdm=False))
    trainer.train()
    assert "Margin" in notebook.shown[-1]
    assert "Learning Rate" in notebook.shown[-1]


def test_other_processes_show_nothing(capsys):
    callback = RichProgressCallback()
    state = TrainerState(max_steps=3, is_world_process_zero=False)
    for event in ("on_train_begin", "on_step_end", "on_prediction_step", "on_evaluate", "on_log", "on_train_end"):
        getattr(callback, event)(None, state, TrainerControl(), logs={"loss": 1.0})
    assert callback.progress is None
    assert capsys.readouterr().out == ""
