"""Half precision on-policy: old log-probabilities are those of training wherever the sampler's are not.

A sampler whose log-probabilities are off by a known amount shows which ones an update reads: rounding differs from CPU
to CPU.
"""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conformity import causal_lm, config, history, prompts, tokenizer
from datasets import Dataset
from ppo_cases import batch, causal
from transformers import AutoModelForCausalLM

import trl
from trl.generation import LocalSampler
from trl.losses.policy import clipped_surrogate, sampling_metrics
from trl.models.scoring import score

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided", "ignore:.*trained weights are stored in")

OFF = 0.01
"""of each token's log-probability, in every second completion"""
SHORT = {"max_completion_length": 20, "generation_kwargs": {"min_new_tokens": 20}}
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate remembers the precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def place(completions, **columns):
    """Every completion of a group has its own reward."""
    return [float(number % 4) for number in range(len(completions))]


def made(folder, kind="RLOO", *, cls=None, model=None, arguments=None, **settings):
    base = {
        "output_dir": str(folder), "use_cpu": True, "bf16": True, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 100, "generation_kwargs": {"min_new_tokens": 100},
        "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "save_rollouts": False,
    }  # fmt: skip
    base |= {"beta": 0.0} if kind in ("RLOO", "GRPO") else {}
    return (cls or getattr(trl, f"{kind}Trainer"))(
        model or long_model(), place, getattr(trl, f"{kind}Config")(**{**base, **settings}), train_dataset=prompts(),
        processing_class=tokenizer(), **(arguments or {}),
    )  # fmt: skip


def long_model():
    """Near uniform, so that rounding is far below `OFF`."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(max_position_embeddings=128, num_hidden_layers=1))


def off(trainer):
    """The trainer, whose sampler is off; and the rows of each pass without gradient."""
    own, scored, passes = trainer.sampler.sample, trainer.scored, []

    def moved(number, one):
        return replace(one, raw_logprobs=[each + OFF * (number % 2) for each in one.raw_logprobs])

    def sample(*args, **kwargs):
        return [[moved(number, one) for number, one in enumerate(group)] for group in own(*args, **kwargs)]

    def counted(model, rows, **kwargs):
        passes.append(len(rows))
        return scored(model, rows, **kwargs)

    trainer.sampler.sample, trainer.scored = sample, counted
    return trainer, passes


# -- the first update ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "outside"),
    [("RLOO", {}, 0.5), ("GRPO", GSPO, 0.5), ("GRPO", {"loss_type": "vespo"}, 0.0), ("GRPO", {"epsilon": 0.005}, 0.5)],
    ids=["rloo", "gspo", "vespo", "tokens"],
)
def test_the_first_update_is_on_policy(kind, settings, outside, tmp_path):
    """exp(-100 * .01) and exp(-.01) lie outside the ranges of trajectories and of GSPO."""
    trainer, passes = off(made(tmp_path, kind, **settings))
    trainer.train()
    assert passes == []
    logged = {name: values[0] for name in trainer.state.log_history[0] if (values := history(trainer, name))}
    assert (logged["ratio"], logged["approx_kl"], logged["policy_kl"]) == (1.0, 0.0, 0.0)
    assert logged["clip_ratio/region_mean"] == logged["clip_ratio/high_max"] == 0.0
    assert logged["grad_norm"] > 0
    assert logged["sampling/outside_clip_range"] == outside
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(OFF / 2, abs=1e-3)
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(OFF, abs=4e-3)
    assert logged["sampling/kl"] == pytest.approx(OFF / 2, abs=1e-3)
    assert logged["sampling/approx_kl"] == pytest.approx(OFF**2 / 4, abs=1e-5)


@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_float32_takes_the_samplers_word_and_holds_it_to_it(kind, tmp_path):
    trainer, passes = off(made(tmp_path, kind, bf16=False))
    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        trainer.train()
    assert passes == []


def test_half_precision_is_held_to_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr("test_half_precision.OFF", 0.1)
    trainer, _ = off(made(tmp_path))
    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        trainer.train()


# -- later updates ------------------------------------------------------------------------------------------------


class Wrapped(trl.RLOOTrainer):
    """An objective of a stranger, which reads the batch as it is."""

    def policy_objective(self, model, batch):
        logprobs_BT = score(model, batch.packed).logprobs_BT
        return clipped_surrogate(logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, batch.mask_BT)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, []),
        ({"gradient_accumulation_steps": 2, "max_steps": 1}, []),
        ({"num_iterations": 2}, [8]),
        ({"steps_per_generation": 2}, [8]),  # of 16
        ({"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4}, [16]),
        ({"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}, [16]),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 2, "max_steps": 1}, []),
        ({"disable_dropout": False}, [8]),
        ({"beta": 0.1}, [8, 8]),  # the reference's pass besides
        ({"cls": Wrapped}, [8]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_one_pass_more_measures_only_what_is_read_later(settings, rows, tmp_path, caplog):
    """With a rate of 0 the policy stays, and so does its ratio: the sampler's numbers would give a KL of 2.5e-5."""
    steps = settings.get("num_iterations", 1) * settings.get("steps_per_generation", 1)
    settings = {**SHORT, "max_steps": steps, **settings}
    trainer, passes = off(made(tmp_path, **settings))
    with caplog.at_level(logging.WARNING, logger="trl.trainer.on_policy"):
        trainer.train()
    assert passes == rows
    assert max(history(trainer, "approx_kl")) < 1e-6
    said = [message for message in caplog.messages if message.startswith("the sampler computes in bfloat16")]
    assert [message.split("one forward pass more ")[1].split(" of each")[0] for message in said] == (
        [f"measures {rows[0]} of the {trainer.rollouts.shape.rows} completions"] if rows else []
    )
    plain, passes = off(made(tmp_path, bf16=False, **settings))
    plain._before_first_update = False  # else the first update finds the sampler out
    plain.train()
    assert passes == rows[: int("beta" in settings)]
    assert history(plain, "approx_kl")[-1] == pytest.approx(OFF**2 / 4, rel=0.01)


def test_the_kl_of_a_reward_starts_at_0(tmp_path):
    for bf16, kl in ((True, 0.0), (False, 20 * OFF / 2)):
        trainer, _ = off(made(tmp_path, beta=0.1, bf16=bf16, **SHORT))
        trainer._before_first_update = False
        trainer.train()
        assert history(trainer, "objective/kl")[0] == pytest.approx(kl, abs=1e-5)


def test_a_rollout_that_is_half_used_is_not_before_its_first_update(tmp_path):
    """Neither in a second run of a trainer, whose steps begin at 0 again, nor after a resume."""
    settings = {
        **SHORT,
        "steps_per_generation": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "kind": "GRPO",
    }
    whole = made(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1, **settings)
    whole.train()
    resumed = made(tmp_path / "b", max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    again = made(tmp_path / "c", max_steps=1, **settings)
    again.train()
    again.train()
    assert history(whole, "ratio")[0] == 1.0
    second = history(whole, "ratio")[1]
    assert second != 1.0
    assert history(resumed, "ratio")[-1] == second
    assert history(again, "ratio")[-1] == second
    assert history(again, "sampling/kl") == []  # of its second run


@pytest.mark.parametrize("kind", ["OnlineDPO", "RAFT"])
def test_who_reads_no_ratio_makes_no_pass_more(kind, tmp_path):
    rows = []
    for bf16 in (False, True):
        trainer, passes = off(made(tmp_path, kind, bf16=bf16, num_generations=2, temperature=1.0, **SHORT))
        trainer.train()
        rows.append(passes)
    assert rows[0] == rows[1] == ([8] if kind == "OnlineDPO" else [])  # of the reference


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_step_of_ppo_starts_from_its_own_pass(epochs, tiny_tokenizer):
    """Which it makes anyway: for the values and the KL."""
    config = trl.PPOConfig(
        batch_size=4, mini_batch_size=2, ppo_epochs=epochs, learning_rate=1e-9,
        accelerator_kwargs={"mixed_precision": "bf16", "cpu": True},
    )  # fmt: skip
    trainer = trl.PPOTrainer(config, causal(), tokenizer=tiny_tokenizer)
    stats = trainer.step(*batch(response_length=40))
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-2)
    assert (stats["ppo/policy/clipfrac"], stats["ppo/policy/approxkl"]) == (0.0, pytest.approx(0, abs=1e-5))
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-4)


# -- one probe, one check: by the precision that is really used ---------------------------------------------------


@pytest.fixture
def rounded(request, monkeypatch):
    """Factors of products lose all but so many bits of their mantissa, as tensor cores read them; no switch says so."""
    plain, mask = F.linear, -(1 << (23 - request.param))

    def linear(x, weight, bias=None):
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            return plain(x, weight, bias)
        return plain(*((each.contiguous().view(torch.int32) & mask).view(torch.float32) for each in (x, weight)), bias)

    monkeypatch.setattr(F, "linear", linear)
    return request.param


@pytest.mark.parametrize("rounded", [10, 7], indirect=True)
@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_rounded_products_are_half_precision(kind, rounded, tmp_path):
    """The trainer's own kernels do not round here, so sampler and trainer differ as they may on a GPU."""
    trainer = made(tmp_path, kind, bf16=False, model=causal_lm(), **SHORT)
    assert isinstance(trainer.sampler, LocalSampler)
    trainer.train()
    assert history(trainer, "ratio") == [1.0]
    assert history(trainer, "sampling/approx_kl")[0] > 1e-12


@pytest.mark.parametrize("rounded", [10, 7], indirect=True)
def test_a_step_of_ppo_allows_for_rounded_products(rounded, tiny_tokenizer):
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-9)
    stats = trl.PPOTrainer(config, causal(), tokenizer=tiny_tokenizer).step(*batch())
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("how", ["switch", "float16", "bfloat16"])
def test_switches_and_weights_are_half_precision(how, tmp_path):
    model = causal_lm() if how == "switch" else causal_lm().to(getattr(torch, how))
    torch.set_float32_matmul_precision("high" if how == "switch" else "highest")
    try:
        trainer, passes = off(made(tmp_path, bf16=False, model=model, **SHORT))
        trainer.train()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert isinstance(trainer.sampler, LocalSampler)
    assert passes == []
    assert history(trainer, "ratio") == [1.0]
    assert history(trainer, "sampling/kl")[0] == pytest.approx(OFF / 2, abs=3e-3)


# -- the metrics --------------------------------------------------------------------------------------------------


def test_what_is_said_of_the_sampler_by_hand():
    trained_BT = torch.tensor([[0.1, 0.3], [0.0, 9.0], [5.0, 5.0]])
    sampled_BT, mask_BT = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = sampling_metrics(trained_BT, sampled_BT, mask_BT, "trajectory", (0.8, 1.2))
    assert found["sampling/sampling_logp_difference/mean"][0] == pytest.approx(0.4)
    assert found["sampling/sampling_logp_difference/max"].value == pytest.approx(0.3)
    total, count = found["sampling/importance_sampling_ratio/mean"]
    assert (float(total), int(count)) == (pytest.approx(torch.tensor(0.4).exp().item() + 1.0), 2)
    assert found["sampling/importance_sampling_ratio/min"].value == 1.0
    assert [int(part) for part in found["sampling/outside_clip_range"]] == [1, 2]
    assert found["sampling/kl"][0] == pytest.approx(-0.4)
    assert found["sampling/approx_kl"][0] == pytest.approx(0.05)
    of_tokens = sampling_metrics(trained_BT, sampled_BT, mask_BT, "token", (0.8, 1.2))
    assert [int(part) for part in of_tokens["sampling/outside_clip_range"]] == [1, 3]
    assert of_tokens["sampling/importance_sampling_ratio/max"].value == pytest.approx(torch.tensor(0.3).exp().item())
    nothing = sampling_metrics(trained_BT, sampled_BT, 0 * mask_BT, "token", (0.8, 1.2))
    assert nothing["sampling/sampling_logp_difference/max"].value == -torch.inf  # left out of the log


@pytest.mark.parametrize(("fields", "said"), [({}, True), ({"temperature": 0.7}, True), ({"top_k": 5}, False)])
def test_ppo_says_how_far_its_sampler_is(fields, said, tiny_tokenizer, tmp_path):
    """The step's own pass measures it; with a filter the sampler's numbers are of another distribution."""
    filters = {"generation_kwargs": {"top_k": 5}} if "top_k" in fields else fields
    config = trl.PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, max_new_tokens=6, steps=2, **filters)
    rows = Dataset.from_list([{"query": "a b"}, {"query": "c d"}])
    trainer = trl.PPOTrainer(
        config, causal(), tokenizer=tiny_tokenizer, dataset=rows, reward_funcs=lambda completions, **columns: [1.0, 0.0]
    )
    draw = trainer.source.draw

    def moved(*args, **kwargs):
        rollout = draw(*args, **kwargs)
        rollout.logprobs = [[each + OFF for each in row] for row in rollout.logprobs]
        return rollout

    trainer.source.draw = moved
    stats = trainer.train()
    assert ("sampling/kl" in stats) == said
    if said:
        assert stats["sampling/kl"] == pytest.approx(OFF, abs=1e-4)
        assert stats["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.990, abs=1e-3)
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-4)
    again = trainer.step(*batch(2))
    assert "sampling/kl" not in again  # of responses from elsewhere
