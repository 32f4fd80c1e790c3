"""Rollouts of another computation of the policy: the old log-probabilities are the trainer's, the engine's weigh.

The engine is the local sampler with log-probabilities that are off by a known amount.
"""

import math
from dataclasses import replace

import pytest
import torch
from conformity import causal_lm, prompts, tokenizer
from datasets import Dataset
from environments_for_tests import talkative
from ppo_cases import causal
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import trl
from trl.data.records import Rollout
from trl.generation import make_sampler
from trl.losses.policy import clipped_surrogate
from trl.models.scoring import score
from trl.rollout.experience import Experience

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided")

OFF = 0.1
T = 6


class Engine:
    """The local sampler, as if it were outside: `off` is added to every log-probability of every second completion."""

    exact = False

    def __init__(self, inner, off=OFF, says_kept=True, every=2):
        self.inner, self.off, self.says_kept, self.every = inner, off, says_kept, every

    def sample(self, prompts, params, n=1):
        moved = [
            [self._moved(k, one) for k, one in enumerate(group)] for group in self.inner.sample(prompts, params, n)
        ]
        return moved

    def _moved(self, number, one):
        amount = self.off if number % self.every == self.every - 1 else 0.0
        off = [each + amount for each in one.logprobs]
        return replace(one, logprobs=off, raw_logprobs=off, kept=one.kept if self.says_kept else None)


def place(completions, **columns):
    """Every completion of a group has its own reward."""
    return [float(number % 4) for number in range(len(completions))]


def made(folder, kind="GRPO", *, cls=None, engine=None, arguments=None, **settings):
    base = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": T, "generation_kwargs": {"min_new_tokens": T}, "max_steps": 1, "logging_steps": 1,
        "learning_rate": 0.0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "beta": 0.0,
        "save_rollouts": False, "vllm_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    if engine is not None:
        base["generation_kwargs"] = None
    trainer = (cls or getattr(trl, f"{kind}Trainer"))(
        causal_lm(), place, getattr(trl, f"{kind}Config")(**{**base, **settings}), train_dataset=prompts(),
        processing_class=tokenizer(), **(arguments or {}),
    )  # fmt: skip
    if engine is not None:
        trainer.sampler = engine(trainer.sampler)
        trainer.source = trainer.collector.source = trainer.make_source()
    return trainer


def logged(trainer, step=0):
    return {name: trainer.state.log_history[step][name] for name in trainer.state.log_history[step]}


def trained(*args, **kwargs):
    trainer = made(*args, **kwargs)
    trainer.train()
    return logged(trainer)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_an_engine_that_is_off_by_a_constant_scales_the_gradient_by_its_ratio(kind, tmp_path):
    every = lambda inner: Engine(inner, OFF, every=1)  # noqa: E731
    plain = trained(tmp_path, kind, engine=every, vllm_importance_sampling_correction=False)
    weighed = trained(tmp_path, kind, engine=every)
    assert weighed["grad_norm"] == pytest.approx(plain["grad_norm"] * math.exp(-OFF), rel=1e-4)
    assert weighed["sampling/weight"] == pytest.approx(math.exp(-OFF), rel=1e-5)
    assert weighed["sampling/corrected"] == 0.0
    for found in (plain, weighed):
        assert (found["ratio"], found["approx_kl"]) == (1.0, 0.0)
        assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(OFF, rel=1e-4)
        assert found["sampling/sampling_logp_difference/max"] == pytest.approx(OFF, rel=1e-4)
        assert found["sampling/kl"] == pytest.approx(OFF, rel=1e-4)
    assert "sampling/weight" not in plain


@pytest.mark.parametrize(
    ("settings", "off", "weight", "corrected"),
    [
        ({"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5}, 0.8, 0.5, 0.5),
        ({"vllm_importance_sampling_clip_max": 1.05}, -0.1, 1.025, 0.5),
        ({"vllm_importance_sampling_cap": 1.05}, -0.1, 1.025, 0.5),
        ({"vllm_importance_sampling_mode": "geometric_mask", "vllm_importance_sampling_clip_max": 2.0}, -0.8, 0.5, 0.5),
    ],
    ids=["icepop", "tis", "cap", "geometric"],
)
def test_bounds_of_the_weight(settings, off, weight, corrected, tmp_path):
    found = trained(tmp_path, engine=lambda inner: Engine(inner, off), **settings)
    half = found["sampling/corrected"]
    assert half == pytest.approx(corrected, abs=0.2)  # rows may end early
    kept = settings.get("vllm_importance_sampling_cap", settings.get("vllm_importance_sampling_clip_max", 3.0))
    of_bounded = kept if "mask" not in settings.get("vllm_importance_sampling_mode", "") else 0.0
    assert found["sampling/weight"] == pytest.approx(1 - half + half * of_bounded, rel=1e-4)


def test_the_default_drops_completions_above_three(tmp_path):
    """log 3 over at most 6 tokens: each is off by -2."""
    found = trained(
        tmp_path, engine=lambda inner: Engine(inner, -2.0), vllm_importance_sampling_mode="sequence_mask",
        loss_type="grpo",
    )  # fmt: skip
    assert found["sampling/weight"] == pytest.approx(1 - found["sampling/corrected"], rel=1e-5)
    assert 0.2 < found["sampling/corrected"] < 0.8


def test_later_updates_are_weighed_too(tmp_path):
    """Two passes over a rollout; the second one's old log-probabilities are measured, and its weights the first's."""
    trainer = made(tmp_path, engine=Engine, num_iterations=2, max_steps=2, learning_rate=1e-3)
    passes = []
    own = trainer.scored
    trainer.scored = lambda model, rows, **more: (passes.append(len(rows)), own(model, rows, **more))[1]
    trainer.train()
    first, second = logged(trainer), logged(trainer, 1)
    assert passes == [8]
    assert second["approx_kl"] > 0 == first["approx_kl"]
    for name in ("sampling/weight", "sampling/kl", "sampling/sampling_logp_difference/mean"):
        assert second[name] == pytest.approx(first[name], rel=1e-3)


def test_the_local_sampler_is_not_weighed(tmp_path):
    found = trained(tmp_path)
    assert "sampling/weight" not in found
    assert found["sampling/sampling_logp_difference/mean"] < 1e-5
    trainer = made(tmp_path)
    assert not trainer.engine_samples
    assert next(iter(trainer.rollouts))["policy"].behaviour_BT is None


def test_settings_of_the_correction_are_said_to_do_nothing_where_there_is_none(tmp_path, caplog):
    made(tmp_path, staleness_correction="none")
    said = [line for line in caplog.messages if "no mismatch to correct" in line]
    assert said == [
        "vllm_importance_sampling_mode='token_truncate', staleness_correction='none': no effect, for sampler and "
        "policy are one model: there is no mismatch to correct"
    ]
    caplog.clear()
    made(tmp_path, staleness_correction="none", max_staleness=1)
    assert not [line for line in caplog.messages if "no mismatch to correct" in line]


def test_clipped_around_the_engine_itself(tmp_path):
    """Plain PPO: the engine's log-probabilities are the old ones, so the first ratio is not 1."""
    found = trained(tmp_path, engine=lambda inner: Engine(inner, OFF, every=1), staleness_correction="none")
    assert found["ratio"] == pytest.approx(math.exp(-OFF), rel=1e-4)
    assert "sampling/weight" not in found


@pytest.mark.parametrize("correction", ["decoupled", "none"])
def test_a_stale_rollout_of_the_local_sampler(correction, tmp_path, monkeypatch):
    """Weights have changed since it sampled: those of now are the proximal policy, the rollout's the behaviour."""
    trainer = made(tmp_path, staleness_correction=correction)
    drawn = trainer.source.draw
    other = causal_lm(1).state_dict()

    def stale(*args):
        rollout = drawn(*args)
        trainer.model.load_state_dict(other)
        trainer._is_stale = True
        return rollout

    monkeypatch.setattr(trainer.source, "draw", stale)
    if correction == "none":
        trainer.starts_at_ratio_one = lambda: False
    trainer.train()
    found = logged(trainer)
    assert found["sampling/sampling_logp_difference/mean"] > 0.01
    if correction == "none":
        assert found["ratio"] != 1.0
        assert found["approx_kl"] > 1e-5
    else:
        assert (found["ratio"], found["approx_kl"]) == (1.0, 0.0)
        assert found["sampling/weight"] == pytest.approx(found["sampling/importance_sampling_ratio/mean"], rel=0.05)


class Stranger(trl.RLOOTrainer):
    """An objective that reads the batch as it is."""

    weights = None

    def policy_objective(self, model, batch):
        Stranger.weights = batch.weight_BT
        logprobs_BT = score(model, batch.packed).logprobs_BT
        return clipped_surrogate(
            logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, batch.mask_BT, weight_BT=batch.weight_BT
        )


def test_an_objective_of_a_stranger_finds_the_weights_in_its_batch(tmp_path):
    trainer = made(tmp_path, "RLOO", cls=Stranger, engine=lambda inner: Engine(inner, OFF, every=1))
    trainer.train()
    assert Stranger.weights.unique().tolist() == pytest.approx([math.exp(-OFF)] * len(Stranger.weights.unique()))


# -- rollouts of a function -----------------------------------------------------------------------


def rollout_of(rows, off):
    """Forced completions; what the policy says of them plus `off`."""
    ids = [[3 + (i + k) % 20 for k in range(4)] for i in range(len(rows))]
    prompt_ids = [row["prompt_ids"] for row in rows]
    made = Experience.of(Rollout(prompt_ids, ids, [], [[1] * 4] * len(rows)))
    with torch.no_grad():
        logprobs_BT = score(causal_lm().eval(), made.packed()).logprobs_BT
    return Rollout(prompt_ids, ids, (logprobs_BT + off).tolist(), [[1] * 4] * len(rows))


def test_a_rollout_func_says_whose_log_probabilities_it_gives(tmp_path):
    asks = {"rollout_func": lambda rows, trainer: rollout_of(rows, OFF)}
    own = trained(tmp_path, arguments=asks)
    assert own["ratio"] == pytest.approx(math.exp(-OFF), rel=1e-4)
    assert "sampling/weight" not in own
    engine = trained(tmp_path, arguments=asks, rollout_logprobs="engine")
    assert engine["ratio"] == 1.0
    assert engine["sampling/weight"] == pytest.approx(math.exp(-OFF), rel=1e-4)


def test_an_engine_without_log_probabilities_is_an_error(tmp_path):
    def silent(rows, trainer):
        return replace(rollout_of(rows, 0.0), logprobs=[])

    with pytest.raises(ValueError, match="rollout_func gave no logprobs"):
        trained(tmp_path, arguments={"rollout_func": silent}, rollout_logprobs="engine")
    with pytest.raises(ValueError, match="rollout_logprobs='engine': no effect without a rollout_func"):
        made(tmp_path, rollout_logprobs="engine")


# -- mixtures -------------------------------------------------------------------------------------


class MixtureEngine(Engine):
    """Says of each token read or written which experts it went to: other ones than the router's."""

    def _moved(self, number, one):
        length = 3 + len(one.ids)  # of the longest prompt and the completion but its last token, or less
        numbers = torch.arange(length * 2 * 2).view(length, 2, 2)
        return replace(super()._moved(number, one), experts=(numbers % 4).numpy().astype("uint8"))


def mixture_of_experts():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
            num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("replays", [True, False])
def test_a_mixtures_experts_are_those_of_the_engine(replays, tmp_path, monkeypatch):
    mixture = mixture_of_experts()
    monkeypatch.setattr("test_engine_mismatch.causal_lm", lambda: mixture)
    trainer = made(
        tmp_path, engine=lambda inner: MixtureEngine(inner, 0.0), routing_replay=replays, beta=0.1, num_iterations=2,
        max_steps=2,
    )  # fmt: skip
    seen = []
    trainer.model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[1].clone())
    )
    experience = trainer.rollouts.make(trainer.rollouts.state)
    assert (experience.experts is not None) == replays
    batch = experience.batch()
    seen.clear()
    with torch.no_grad():
        score(trainer.model, batch.packed)
    (sent,) = seen[-1:]
    if replays:
        known = batch.packed.experts_NLC[:, 0] >= 0
        assert torch.equal(sent[known], batch.packed.experts_NLC[:, 0][known].long())
        assert known.float().mean() > 0.5
    trainer.train()
    assert logged(trainer)["ratio"] == logged(trainer, 1)["ratio"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("replays", [True, False])
def test_turns_of_an_environment_do_not_carry_experts(replays, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("test_engine_mismatch.causal_lm", mixture_of_experts)
    inner = make_sampler(mixture_of_experts(), tokenizer())
    given = {"environment": talkative(), "sampler": MixtureEngine(inner, 0.0)}
    with caplog.at_level("WARNING", "trl"):
        trainer = lambda model, reward, config, **parts: trl.GRPOTrainer(model, None, config, **parts)  # noqa: E731
        made(tmp_path, cls=trainer, arguments=given, routing_replay=replays, generation_kwargs=None)
    said = [text for text in caplog.messages if text.startswith("routing_replay=True: ")]
    line = "the turns of an environment do not say which experts the engine took: training chooses them anew"
    assert said == [f"routing_replay=True: {line}"] * replays


# -- PPO ------------------------------------------------------------------------------------------


def ppo(tokenizer, off=None, **fields):
    config = trl.PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, max_new_tokens=6, steps=2, **fields)
    rows = Dataset.from_list([{"query": "a b"}, {"query": "c d"}])
    trainer = trl.PPOTrainer(
        config, causal(), tokenizer=tokenizer, dataset=rows, reward_funcs=lambda completions, **columns: [1.0, 0.0]
    )
    if off is not None:
        trainer.source.sampler = Engine(trainer.source.sampler, off, every=1)
    return trainer, trainer.train()


def test_ppo_weighs_what_an_engine_sampled(tiny_tokenizer):
    """The policy's loss alone is weighed, not the critic's."""
    mode = {"vllm_importance_sampling_mode": "token_truncate"}
    _, plain = ppo(tiny_tokenizer)
    _, off = ppo(tiny_tokenizer, OFF, **mode)
    _, unweighed = ppo(tiny_tokenizer, OFF, vllm_importance_sampling_correction=False)
    assert "sampling/weight" not in plain
    assert "sampling/weight" not in unweighed
    assert off["sampling/weight"] == pytest.approx(math.exp(-OFF), rel=1e-4)
    assert off["sampling/corrected"] == 0.0
    assert off["ppo/policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert off["ppo/loss/policy"] == pytest.approx(unweighed["ppo/loss/policy"] * math.exp(-OFF), rel=1e-3, abs=1e-7)
    assert off["ppo/loss/value"] == pytest.approx(unweighed["ppo/loss/value"], rel=1e-5)


def test_ppo_does_not_weigh_another_distribution(tiny_tokenizer, caplog):
    _, found = ppo(tiny_tokenizer, OFF, generation_kwargs={"top_k": 5})
    assert "sampling/weight" not in found
    assert "of another distribution" in caplog.text
    with pytest.raises(ValueError, match="importance sampling mode 'tis'"):
        trl.PPOConfig(vllm_importance_sampling_mode="tis")


# -- filters --------------------------------------------------------------------------------------

FILTERS = [{"top_k": 5}, {"top_p": 0.6}, {"top_p": 0.7, "temperature": 0.8, "top_k": 9}, {"min_p": 0.6}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_what_was_left_to_choose_from_is_what_is_normalised_over(filters, tmp_path):
    """The sampler's processed log-probabilities are the trainer's, and the first ratio is 1."""
    trainer = made(tmp_path, keep_sampling_mask=True, **filters)
    experience = trainer.rollouts.make(trainer.rollouts.state)
    assert experience.kept is not None
    packed = experience.packed()
    assert packed.choices_SK.shape[1] > 1
    with torch.no_grad():
        scored_BT = score(trainer.model, packed, temperature=trainer.args.temperature).logprobs_BT
        whole_BT = score(trainer.model, replace(packed, choices_SK=None)).logprobs_BT
    torch.testing.assert_close(scored_BT, experience.old_logprobs_BT, atol=2e-6, rtol=0)
    assert (scored_BT - whole_BT)[experience.mask_BT > 0].max() > 0.1
    found = trained(tmp_path, keep_sampling_mask=True, **filters)
    assert found["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["approx_kl"] < 1e-9


def test_filters_without_the_mask_are_as_before(tmp_path):
    experience = made(tmp_path, top_k=5).rollouts
    assert experience.make(experience.state).kept is None


def test_an_engine_that_says_the_masks_is_weighed_over_them(tmp_path):
    found = trained(tmp_path, engine=lambda inner: Engine(inner, OFF, every=1), top_k=5)
    assert found["sampling/weight"] == pytest.approx(math.exp(-OFF), rel=1e-4)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(OFF, rel=1e-3)
    assert found["ratio"] == 1.0


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_k": 5, "keep_sampling_mask": False}, {"repetition_penalty": 1.2}]
)
def test_an_engine_that_does_not_is_not_weighed_and_that_is_said(settings, tmp_path, caplog):
    says = "keep_sampling_mask" in settings
    trainer = made(tmp_path, engine=lambda inner: Engine(inner, says_kept=says), max_steps=2, **settings)
    trainer.train()
    found = logged(trainer)
    assert not {name for name in found if name.startswith("sampling/weight") or "logp_difference" in name}
    assert found["ratio"] == 1.0
    assert [record.getMessage()[:12] for record in caplog.records].count("top_p, top_k") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_sampling_mask": True}, "no effect without top_p, top_k or min_p"),
        ({"keep_sampling_mask": True, "top_k": 5, "repetition_penalty": 1.1}, "a penalty changes the odds"),
        ({"vllm_importance_sampling_mode": "geometric"}, "geometric_mask"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "give a ratio >= 1"),
        ({"vllm_importance_sampling_clip_min": 1.5}, r"give a ratio in \[0, 1\]"),
        ({"vllm_importance_sampling_cap": 0.5}, "vllm_importance_sampling_clip_max=0.5"),
        ({"vllm_importance_sampling_cap": 2.0, "vllm_importance_sampling_clip_max": 4.0}, "two names of one setting"),
        ({"staleness_correction": "always"}, "decoupled"),
        ({"rollout_logprobs": "vllm"}, "engine"),
    ],
)
def test_wrong_settings_are_said(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
