"""Metrics: which names each trainer logs, that they are exact, and that they cost no further pass."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conformity import CASES, build, causal_lm, history, texts, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.write_metrics import PAGE, written
from trl import CPOConfig, DPOConfig, GRPOConfig, SFTConfig, SFTTrainer
from trl.kernels import head_tiles
from trl.models.scoring import Head, token_logprobs
from trl.trainer.metrics import METRICS, OF_TRANSFORMERS, named

TRAINERS = {
    "sft": "SFT", "dpo-sigmoid": "DPO", "orpo": "ORPO", "cpo": "CPO", "simpo": "SimPO", "kto": "KTO",
    "reward": "Reward", "prm": "PRM", "grpo": "GRPO", "rloo": "RLOO", "online-dpo": "OnlineDPO", "raft": "RAFT",
    "distillation": "Distillation",
}  # fmt: skip
MET = {"grpo": {"completions that end"}}
"""conditions of the table that hold in a case; groups of 2 or more have theirs everywhere"""


def test_the_glossary_is_that_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page


def test_every_trainer_has_its_case():
    assert {trainer for metric in METRICS for trainer in metric.trainers} == {*TRAINERS.values(), "PPO"}


@pytest.mark.parametrize("case", TRAINERS)
def test_the_logs_hold_the_names_of_the_table(case, tmp_path):
    trainer = build(case, tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    kind = TRAINERS[case]
    logged = {name for row in trainer.state.log_history for name in row} - {"step"}
    own = {name for name in logged if re.sub("^(train|eval)_", "", name) not in OF_TRANSFORMERS}
    assert {name for name in own if named(kind, name) is None} == set()
    always = [metric for metric in METRICS if kind in metric.trainers and not metric.when]
    training = {name for name in own if not name.startswith("eval_")}
    assert [m.name for m in always if not any(map(m.names, training))] == []
    evaluated = {name.removeprefix("eval_") for name in own - training}
    assert [m.name for m in always if m.evaluated and not any(map(m.names, evaluated))] == []


# -- exact -------------------------------------------------------------------------------------------------------


def test_entropy_and_accuracy_are_those_of_whole_logits(tmp_path):
    trainer = build("sft", tmp_path)
    found = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))["packed"]
    entropies, right = [], []
    for row in range(batch.rows):
        ids = batch.ids_N[batch.row_indices(row)]
        logp = trainer.model(ids[None]).logits[0, :-1].log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
        right.append((logp.argmax(-1) == ids[1:]).float())
    assert found["eval_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(torch.cat(right).mean().item(), abs=1e-6)


def test_a_pairs_entropy_is_of_both_and_its_accuracy_of_the_chosen(tmp_path):
    trainer = build("dpo-sigmoid", tmp_path)
    found = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))["packed"]
    entropies, right = [], []
    for row in range(batch.rows):
        ids, start = batch.ids_N[batch.row_indices(row)], batch.prompt_tokens[row]
        logp = trainer.model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
        if row % 2 == 0:
            right.append((logp.argmax(-1) == ids[start:]).float())
    assert found["eval_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(torch.cat(right).mean().item(), abs=1e-6)


@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "orpo", "kto-bco", "reward"])
def test_the_cut_of_an_evaluation_changes_no_metric(case, tmp_path):
    """Batches of 2, 2 and 1 rows: a mean of their means would be another number."""
    rows = CASES[case].rows().select(range(5))
    found = []
    for size in (1, 2, 5):
        trainer = build(case, tmp_path, per_device_eval_batch_size=size)
        means = trainer.evaluate(trainer.prepare_evaluation(_tokenised(trainer, case, rows, tmp_path)))
        found.append({name: value for name, value in means.items() if not re.search("second|time", name)})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert found[2][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    if case == "kto-bco":
        margin = found[0]["eval_rewards/chosen"] - found[0]["eval_rewards/rejected"]
        assert found[0]["eval_rewards/margins"] == pytest.approx(margin)
        assert found[0]["eval_logps/chosen"] < 0
    if case == "reward":
        assert found[0]["eval_min_reward"] < found[0]["eval_mean_reward"] < found[0]["eval_max_reward"]


def _tokenised(trainer, case, rows, folder):
    """The rows as the trainer prepares its own."""
    return type(trainer)(
        model=CASES[case].model(), args=trainer.args, train_dataset=CASES[case].rows(), eval_dataset=rows,
        processing_class=tokenizer(),
    ).eval_dataset  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tokens_are_counted_over_steps_and_a_resume(size, tmp_path):
    settings = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "save_strategy": "steps",
        "save_steps": 1, "logging_steps": 3, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    whole = build("sft", tmp_path, **settings)
    lengths = [len(row["input_ids"]) for row in whole.train_dataset]
    whole.train()
    assert history(whole, "num_tokens") == history(whole, "eval_num_tokens")[2:]
    assert history(whole, "eval_num_tokens")[1] == sum(lengths)  # 2 steps of 4 rows are all 8
    resumed = build("sft", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # between two logs
    assert history(resumed, "num_tokens") == history(whole, "num_tokens")


def test_a_pairs_prompt_counts_with_each_answer(tmp_path):
    trainer = build("dpo-sigmoid", tmp_path)
    rows = list(trainer.train_dataset)
    trainer.train()
    expected = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert history(trainer, "num_tokens")[-1] == expected


def test_a_rollout_counts_once_however_often_it_is_learned(tmp_path):
    trainer = build("grpo", tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    first, second, third, fourth = history(trainer, "num_tokens")
    assert first == second < third == fourth


def test_the_best_checkpoint_may_be_chosen_by_accuracy(tmp_path):
    config = SFTConfig(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_mean_token_accuracy", report_to="none",
        disable_tqdm=True, learning_rate=0.05,
    )  # fmt: skip
    trainer = SFTTrainer(causal_lm(), config, train_dataset=texts(), eval_dataset=texts(), processing_class=tokenizer())
    trainer.train()
    assert trainer.state.best_metric == max(history(trainer, "eval_mean_token_accuracy")) > 0
    state = json.loads((Path(trainer.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert state["best_metric"] == trainer.state.best_metric


# -- free --------------------------------------------------------------------------------------------------------


class Tiles(TorchDispatchMode):
    """Counts operations on all of a tile of logits, and keeps the size of the largest result."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.found, self.largest = sizes, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")

        def tile(value):
            return isinstance(value, torch.Tensor) and value.numel() in self.sizes

        views = {"view", "unsqueeze", "expand", "t", "transpose", "slice", "select", "detach", "alias", "unsafe_view"}
        not_all = {"index", "index_put", "new_empty", "empty_like"}  # a number for each row, and memory unwritten
        if name not in views | not_all and any(map(tile, tree_leaves((result, args, kwargs)))):
            self.found[name] += 1
        for value in tree_leaves(result):
            self.largest = max(self.largest, value.numel() if isinstance(value, torch.Tensor) else 0)
        return result


ROWS, WORDS, TILES = 7, 11, 3
BEFORE_METRICS = {  # what a tile took in commit 5a5c938, which had neither entropy nor accuracy in its training steps
    "trained": Counter(mm=1, amax=1, sub=1, exp=1, sum=1) + Counter(mul=1, addmm=2),  # forward and back
    "frozen": Counter(mm=1, amax=1, sub=1, exp=1, sum=1, addmm=1),
}


def counted(trained, entropy, monkeypatch):
    """The operations of a pass through the head and back."""
    words = [slice(start, start + WORDS) for start in range(0, TILES * WORDS, WORDS)]
    monkeypatch.setattr(head_tiles, "tiles", lambda *shape: words)
    module = torch.nn.Linear(4, TILES * WORDS, bias=False).requires_grad_(trained)
    hidden = torch.randn(ROWS, 4, requires_grad=True)
    with Tiles({ROWS * WORDS}) as tiles:
        token_logprobs(Head(module, TILES * WORDS), hidden, torch.arange(ROWS), entropy=entropy)[0].sum().backward()
    return tiles


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_with_all_metrics_the_head_takes_no_more_operations_than_without_them_before(kind, monkeypatch):
    """Forward without products: largest, softmax, product of numbers, sum; it was largest, difference, exp, sum."""
    found = counted(kind == "trained", True, monkeypatch)
    now = Counter({name: count / TILES for name, count in found.found.items()})
    assert now.total() <= BEFORE_METRICS[kind].total() == {"trained": 8, "frozen": 6}[kind]
    shared = Counter(mm=1, amax=1, softmax=1, mul=1, sum=1)
    assert now == shared + (Counter(mul=1, addmm=2) if kind == "trained" else Counter(addmm=1))
    assert found.largest < ROWS * TILES * WORDS  # no tensor of all logits
    without = Counter(
        {name: count / TILES for name, count in counted(kind == "trained", False, monkeypatch).found.items()}
    )
    assert now - without == Counter(mul=1, sum=1)


def test_a_step_calls_the_head_as_often_as_without_metrics(tmp_path, monkeypatch):
    """The products of an SFT and a DPO step with the weights of the head, forward and backward."""
    made = []
    logits = head_tiles.Linear.logits
    monkeypatch.setattr(head_tiles.Linear, "logits", lambda self, *rest: made.append(1) or logits(self, *rest))
    for case, passes in (("sft", 1), ("dpo-sigmoid", 2)):  # DPO's reference has one of its own
        trainer = build(case, tmp_path, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)
        made.clear()
        trainer.compute_loss(trainer.model.train(), batch).backward()
        assert len(made) == passes


# -- losses by their names in configs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.0},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "entropy_coef": 0.1},
    ],
)
def test_luspo_and_vespo_train_whatever_the_micro_batches(settings, tmp_path):
    runs = []
    for size in (8, 4):
        sizes = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size,
            "steps_per_generation": 8 // size,
        }  # fmt: skip
        runs.append(build("grpo", tmp_path, num_iterations=2, **sizes, **settings))
    for run in runs:
        run.train()
    for key in ("grad_norm", "reward"):
        assert history(runs[0], key) == pytest.approx(history(runs[1], key), rel=1e-4)
    before = causal_lm().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in runs[0].model.state_dict().items())


def test_what_has_no_effect_is_said(tmp_path, caplog):
    out = {"output_dir": str(tmp_path), "num_generations": 2, "per_device_train_batch_size": 2}
    GRPOConfig(loss_type="luspo", **out)
    assert "ratio of sequences" in caplog.text
    GRPOConfig(loss_type="vespo", importance_sampling_level="sequence", **out)
    assert "importance_sampling_level='sequence': no effect" in caplog.text
    with pytest.raises(ValueError, match=r"vespo_k_pos=1\.0: it has no effect without loss_type='vespo'"):
        GRPOConfig(vespo_k_pos=1.0, **out)
    with pytest.raises(ValueError, match=r"epsilon=0\.1: no effect with loss_type='vespo'"):
        GRPOConfig(loss_type="vespo", epsilon=0.1, **out)
    with pytest.raises(ValueError, match=r"vespo_lambda_neg=-1: give a number >= 0"):
        GRPOConfig(loss_type="vespo", vespo_lambda_neg=-1, **out)
    with pytest.raises(ValueError, match="f_divergence_type='js_divergence': loss_type='sigmoid_norm'"):
        DPOConfig(str(tmp_path), loss_type="sigmoid_norm", f_divergence_type="js_divergence")


def test_cpo_simpo_is_simpo_and_the_likelihood():
    assert CPOConfig("out", loss_type="simpo", simpo_gamma=0.3).losses() == {"simpo": 1.0, "sft": 1.0}
    assert CPOConfig("out", loss_type="simpo", simpo_gamma=0.3).options()["gamma"] == 0.3
    assert CPOConfig("out", loss_type="simpo", cpo_alpha=0.0).losses() == {"simpo": 1.0}
    shaped = CPOConfig("out", loss_type="simpo", cpo_alpha=0.5, alpha=0.25)
    assert shaped.losses() == {"alphapo": 1.0, "sft": 0.5}
    assert shaped.options() == {"label_smoothing": None, "gamma": 0.5, "alpha": 0.25}
    assert CPOConfig("out", loss_type="alphapo", alpha=0.25).losses() == {"alphapo": 1.0}
    for wrong in ({"simpo_gamma": 0.3}, {"alpha": 0.25}, {"alpha": 0.25, "loss_type": "ipo"}):
        with pytest.raises(ValueError, match="it has no effect without loss_type='simpo' or 'alphapo'"):
            CPOConfig("out", **wrong)
    with pytest.raises(ValueError, match=r"cpo_alpha=0\.5: alphapo has no likelihood term"):
        CPOConfig("out", loss_type="alphapo", cpo_alpha=0.5)


def test_cpo_simpo_with_nothing_added_is_simpo(tmp_path):
    simpo = build("simpo", tmp_path, beta=2.0, gamma=0.3)
    cpo = build("cpo", tmp_path, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.3)
    both = build("cpo", tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.3)
    found, same, added = (run.evaluate() for run in (simpo, cpo, both))
    assert same["eval_loss"] == pytest.approx(found["eval_loss"])
    assert added["eval_loss"] == pytest.approx(found["eval_loss"] + added["eval_nll_loss"], abs=1e-5)
