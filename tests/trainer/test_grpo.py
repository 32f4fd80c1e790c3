"""GRPO and RLOO as trainers: what settings do, what is refused, what becomes of rewards that misbehave."""

import logging
import math
import threading
from pathlib import Path

import pytest
import torch
from conformity import CASES, causal_lm, config, early_letters, history, prompts, tokenizer, weights
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import trl
from trl.data.records import Rollout
from trl.losses.loss_sum import LossSum
from trl.losses.policy import clipped_surrogate
from trl.models.scoring import score
from trl.rewards.panel import RewardError
from trl.rollout.experience import Experience
from trl.trainer.on_policy import OnPolicyTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


def make(directory, algorithm="GRPO", model=None, rows=None, reward_funcs=early_letters, arguments=None, **settings):
    base = {
        "output_dir": str(directory), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 6, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return getattr(trl, f"{algorithm}Trainer")(
        model=model or causal_lm(),
        reward_funcs=reward_funcs,
        args=getattr(trl, f"{algorithm}Config")(**{**base, **settings}),
        train_dataset=rows or prompts(),
        processing_class=tokenizer(),
        **(arguments or {}),
    )


def trained(directory, **kwargs):
    trainer = make(directory, **kwargs)
    trainer.train()
    return trainer


def same_weights(one, other, tolerance=0.0):
    other = weights(other)
    return all(torch.allclose(v, other[k], rtol=0, atol=tolerance) for k, v in weights(one).items())


def rollouts_of(directory):
    files = sorted(str(path) for path in Path(directory).glob("rollouts/*.parquet"))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(directory))


# -- the first update --------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_the_first_update_of_each_rollout_starts_at_ratio_1(algorithm, tmp_path):
    trainer = trained(tmp_path, algorithm=algorithm, num_iterations=2, max_steps=4)
    ratios, moved = history(trainer, "ratio"), history(trainer, "approx_kl")
    assert ratios[0::2] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert max(moved[0::2]) < 1e-8
    assert min(moved[1::2]) > 1e-6


def test_a_model_that_is_not_the_one_that_sampled_is_noticed(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1.1)

    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        trained(tmp_path, arguments={"callbacks": [Meddler()]})


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_coarse_arithmetic_has_coarser_bounds(algorithm, tmp_path):
    """With TF32 the sampler's numbers differ visibly from the trainer's; that must not end a run."""

    class Rounding(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1.002)

    def run(folder):
        return trained(tmp_path / folder, algorithm=algorithm, arguments={"callbacks": [Rounding()]}, max_steps=1)

    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        run("exact")
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        assert history(run("coarse"), "sampling/approx_kl")[0] > 1e-8
    finally:
        torch.set_float32_matmul_precision("highest")


def test_half_precision_is_checked_too(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(3)

    assert history(trained(tmp_path / "a", bf16=True, use_cpu=True, max_steps=1), "ratio")[0] == pytest.approx(
        1.0, abs=0.02
    )
    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        trained(tmp_path / "b", bf16=True, use_cpu=True, max_steps=1, arguments={"callbacks": [Meddler()]})


def test_every_objective_is_checked(tmp_path):
    """Also one that a stranger wrote: the base looks at its metrics."""

    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1.1)

    class Plain(trl.RLOOTrainer):
        def policy_objective(self, model, batch):
            logprobs_BT = score(model, batch.packed).logprobs_BT
            return clipped_surrogate(logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, batch.mask_BT)

    trainer = Plain(
        causal_lm(), early_letters, trl.RLOOConfig(output_dir=str(tmp_path), report_to="none", max_completion_length=6),
        prompts(), processing_class=tokenizer(), callbacks=[Meddler()],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        trainer.train()


def with_dropout():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(attention_dropout=0.5))


def test_dropout_is_off_unless_it_is_wanted(tmp_path):
    off, on = trained(tmp_path, model=with_dropout()), trained(tmp_path, model=with_dropout(), disable_dropout=False)
    assert history(off, "approx_kl")[0] < 1e-8
    assert history(on, "approx_kl")[0] > 1e-6  # by choice: no error


# -- what is not computed ----------------------------------------------------------------------


def one_good_group(prompts, completions, **columns):
    """Rewards that differ within the groups of some prompts only."""
    pairs = zip(prompts, completions, strict=True)
    return [sum(map(ord, text)) / 100 if prompt[0] in "af" else 1.0 for prompt, text in pairs]


SKIPPING = [
    ("GRPO", {}), ("GRPO", {"mask_truncated_completions": True, "max_completion_length": 12}),
    ("GRPO", {"loss_type": "dr_grpo"}), ("GRPO", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("GRPO", {"loss_type": "cispo"}), ("GRPO", {"loss_type": "sapo"}), ("GRPO", {"off_policy_mask_threshold": 0.1}),
    ("GRPO", {"top_entropy_quantile": 0.5}), ("GRPO", {"advantage": "leave_one_out"}),
    ("RLOO", {}), ("RLOO", {"mask_truncated_completions": True, "max_completion_length": 12}),
]  # fmt: skip
"""algorithms that do not compute rows without advantage"""


@pytest.mark.parametrize(("algorithm", "settings"), SKIPPING)
def test_rows_that_cannot_matter_are_not_computed_and_the_gradient_is_the_same(
    algorithm, settings, tmp_path, monkeypatch
):
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "beta": 0.0, "max_steps": 1}
    seen = {}
    for skip in (True, False):
        trainer = make(tmp_path, algorithm=algorithm, reward_funcs=one_good_group, **{**whole, **settings})
        computed = []
        inner = trainer.policy_objective
        monkeypatch.setattr(
            trainer, "policy_objective", lambda m, b, i=inner, c=computed: c.append(b.packed.rows) or i(m, b)
        )
        if not skip:
            monkeypatch.setattr(trainer, "rows_with_gradient", lambda rows: torch.ones(len(rows)))
        trainer.train()
        monkeypatch.undo()
        seen[skip] = (sum(computed), history(trainer, "grad_norm")[0], trainer)
    assert seen[True][0] < seen[False][0] == 32
    assert seen[True][1] > 0
    assert seen[True][1] == pytest.approx(seen[False][1], rel=1e-5)


def rows_of_experience(advantages):
    """Rows of 1, 2, 3 and 4 tokens, the last one without a counted token."""
    sizes = range(1, 5)
    masks = [[int(n < 4)] * n for n in sizes]
    rollout = Rollout([[1, 2]] * 4, [[2 + n] * n for n in sizes], [[-1.0] * n for n in sizes], masks)
    return Experience.of(rollout, advantages=torch.tensor(advantages))


def test_idle_and_masked_rows_are_counted_but_not_packed(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_completion_length=8)
    collate, rows = trainer.rollouts.collate, rows_of_experience([0.0, 1.0, 0.0, 1.0])
    assert collate(rows)["policy"].packed.rows == 1
    for aggregation, count in (("token", 1 + 2 + 3), ("sequence", 3), ("constant", 4 * 8)):
        trainer.aggregation = aggregation
        assert collate(rows)["policy"].counted == count
    idle = rows_of_experience([0.0] * 4)
    assert collate(idle)["policy"].packed.rows == 0
    monkeypatch.setattr(trainer, "least_rows", lambda: 1)  # as on several processes
    assert collate(idle)["policy"].packed.rows == 1
    monkeypatch.setattr(trainer, "zero_advantage_means_zero_gradient", lambda: False)
    assert collate(idle)["policy"].packed.rows == 3


def test_an_objective_learns_from_rows_without_advantage_unless_it_says_otherwise(tmp_path):
    """The default of a new algorithm: nothing is left out. (Once it was, and an entropy bonus lost these rows.)"""

    class Bonus(OnPolicyTrainer):
        config_class = trl.RLOOConfig

        def advantages(self, scores_BF, weights_F, kl_B):
            return scores_BF[:, 0] - scores_BF[:, 0].mean()

        def policy_objective(self, model, batch):
            entropy_BT = score(model, batch.packed, entropy_gradient=True).entropy_BT
            return LossSum(-entropy_BT.sum(), batch.mask_BT.sum())

    settings = {"max_steps": 1, "max_completion_length": 6, "beta": 0.0, "logging_steps": 1}
    trainer = Bonus(
        causal_lm(), lambda completions, **_: [1.0] * len(completions), train_dataset=prompts(),
        args=trl.RLOOConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, **settings),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(-4.6, abs=0.1)  # ln 100
    assert history(trainer, "grad_norm")[0] > 0


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.5}, {"use_adaptive_entropy": True, "entropy_coef": 0.5}])
def test_the_entropy_bonus_reaches_groups_of_equal_rewards(settings, tmp_path):
    adaptive = {"entropy_target": 9.0} if "use_adaptive_entropy" in settings else {}
    trainer = trained(
        tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions), max_steps=1, **settings, **adaptive
    )
    assert history(trainer, "loss")[0] == pytest.approx(-0.5 * 4.6, abs=0.05)
    assert history(trainer, "grad_norm")[0] > 0


def test_the_kl_in_the_loss_reaches_groups_of_equal_rewards(tmp_path):
    arguments = {"ref_model": causal_lm(seed=1)}
    rewards = {"reward_funcs": lambda completions, **_: [1.0] * len(completions), "arguments": arguments}
    trainer = trained(tmp_path / "loss", max_steps=1, beta=0.5, **rewards)
    assert history(trainer, "grad_norm")[0] > 0
    rewards["arguments"] = {"ref_model": causal_lm(seed=1)}
    assert not make(tmp_path / "loss", beta=0.5, **rewards).zero_advantage_means_zero_gradient()
    rewards["arguments"] = {"ref_model": causal_lm(seed=1)}
    assert make(tmp_path / "reward", beta=0.5, kl_placement="reward", **rewards).zero_advantage_means_zero_gradient()


def test_nothing_to_learn_changes_nothing(tmp_path):
    trainer = trained(tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    assert same_weights(trainer, make(tmp_path))
    assert history(trainer, "frac_reward_zero_std") == [1.0, 1.0]


# -- reward functions --------------------------------------------------------------------------


def test_a_reward_function_that_raises_stops_the_run_and_the_samples_are_kept(tmp_path):
    def broken(completions, **columns):
        raise KeyError("no such column")

    with pytest.raises(RewardError, match="'broken' failed: KeyError"):
        trained(tmp_path, reward_funcs=broken)
    kept = load_dataset(
        "parquet", data_files=str(tmp_path / "unscored" / "*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert len(kept) == 8
    assert set(kept.column_names) == {"step", "prompt", "completion", "completion_ids"}


@pytest.mark.parametrize("value", [math.nan, math.inf, "1"])
def test_a_value_that_is_no_number_stops_the_run(value, tmp_path):
    with pytest.raises(RewardError, match="for completion 0: give a finite number of at most 1e"):
        trained(tmp_path, reward_funcs=lambda completions, **_: [value] * len(completions))
    assert len(list((tmp_path / "unscored").iterdir())) == 1


def test_one_that_hangs_leaves_the_judgement_to_the_others(tmp_path):
    release = threading.Event()

    def hangs(completions, **columns):
        release.wait(20)

    trainer = trained(tmp_path, reward_funcs=[hangs, early_letters], reward_timeout=[0.05, None], max_steps=1)
    release.set()
    assert history(trainer, "rewards/hangs/timed_out") == [1.0]
    assert rollouts_of(tmp_path)["reward_hangs"] == [None] * 8
    alone = trained(tmp_path / "alone", max_steps=1)
    assert same_weights(trainer, alone)
    assert history(trainer, "unscored_ratio") == [0.0]
    may_miss = [key for row in alone.state.log_history for key in row if key.endswith(("timed_out", "unscored_ratio"))]
    assert may_miss == []  # no function has a time-out, and none has had no opinion


def test_completions_without_an_opinion_teach_nothing(tmp_path):
    trainer = trained(tmp_path, reward_funcs=lambda completions, **_: [None] * len(completions), max_steps=1)
    assert history(trainer, "unscored_ratio") == [1.0]
    assert same_weights(trainer, make(tmp_path))
    assert rollouts_of(tmp_path)["advantage"] == [0.0] * 8


def test_columns_and_texts_reach_the_functions_and_the_file(tmp_path):
    seen = []

    async def spy(prompts, completions, completion_ids, wanted, trainer_state, **columns):
        seen.append((prompts, completions, completion_ids, wanted, trainer_state.global_step))
        return [float(len(ids)) for ids in completion_ids]

    trainer = trained(tmp_path, reward_funcs=[spy, early_letters], reward_weights=[0.0, 2.0], max_steps=1)
    given, texts, ids, wanted, step = seen[0]
    assert given[:4] == [given[0]] * 4
    assert tokenizer().batch_decode(ids, skip_special_tokens=True) == texts
    rows = dict(zip(prompts()["prompt"], prompts()["wanted"], strict=True))
    assert wanted == [rows[prompt] for prompt in given]
    assert step == 0
    table = rollouts_of(tmp_path)
    assert table["prompt"] == given
    assert table["completion"] == texts
    assert table["reward_early_letters"] == early_letters(texts)
    assert history(trainer, "reward")[0] == pytest.approx(2 * sum(early_letters(texts)) / 8)


def test_conversations(tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=len(chat_tokenizer), max_position_embeddings=128))
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": c}]} for c in "abcd"])
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    arguments = {"processing_class": chat_tokenizer}
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, train_dataset=rows, **arguments,
        args=trl.GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1,
                            max_completion_length=8, report_to="none", disable_tqdm=True, save_strategy="no"),
    )  # fmt: skip
    trainer.train()
    ((prompt, completion),) = seen
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert rollouts_of(tmp_path)["prompt"][0].startswith('[{"')


def test_the_name_of_a_reward_and_of_a_model(tmp_path):
    causal_lm().save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    trainer = trl.GRPOTrainer(
        str(tmp_path / "policy"), "repetition", train_dataset=prompts(),
        args=trl.GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_steps=1,
                            logging_steps=1, max_completion_length=8, report_to="none", disable_tqdm=True,
                            save_strategy="no"),
    )  # fmt: skip
    trainer.train()
    assert "rewards/repetition/mean" in trainer.state.log_history[0]


# -- settings ----------------------------------------------------------------------------------

EFFECTS = [
    {"loss_type": "grpo"}, {"loss_type": "dr_grpo"}, {"loss_type": "sapo"}, {"loss_type": "cispo"},
    {"epsilon": 1e-4}, {"epsilon": 0.2, "epsilon_high": 1e-4}, 
    {"importance_sampling_level": "sequence"}, {"importance_sampling_level": "sequence_token"},
    {"scale_rewards": False}, {"scale_rewards": "batch"}, {"advantage": "leave_one_out"}, {"advantage": "none"},
    {"advantage": "batch"}, {"advantage": "group_then_batch"}, {"beta": 0.5}, {"beta": 0.5, "kl_estimator": "k2"},
    {"beta": 0.5, "use_bias_correction_kl": False}, {"beta": 0.5, "kl_placement": "reward"},
    {"top_entropy_quantile": 0.3}, {"entropy_coef": 0.5}, {"off_policy_mask_threshold": 1e-6},
    {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.9}, {"repetition_penalty": 1.5},
    {"generation_kwargs": {"min_new_tokens": 20}}, {"max_completion_length": 3}, {"num_generations": 2},
    {"num_iterations": 1}, {"steps_per_generation": 4}, {"generation_batch_size": 24}, {"shuffle_dataset": False},
    {"max_prompt_length": 1}, {"overlong_cache": 3}, {"mask_truncated_completions": True}, {"data_seed": 5},
    {"loss_type": "sapo", "sapo_temperature_neg": 9.0}, {"loss_type": "sapo", "sapo_temperature_pos": 9.0},
    {"loss_type": "cispo", "epsilon_high": 1.001}, {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1},
    {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.1},
    {"reward_weights": [3.0], "scale_rewards": False},
    {"use_adaptive_entropy": True, "entropy_target": 9.0},
    {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1},
    {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.1, "entropy_coef_max": 0.05},
]  # fmt: skip


RLOO_EFFECTS = [
    {"beta": 0.0}, {"num_generations": 2}, {"epsilon": 1e-4}, {"epsilon_high": 1e-4}, {"normalize_advantages": True},
    {"reward_clip_range": (1.0, 2.0)},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "effects"), [("GRPO", EFFECTS), ("RLOO", RLOO_EFFECTS)])
def test_every_setting_has_an_effect(algorithm, effects, tmp_path):
    """Each set of settings ends in weights of its own."""
    base = {"num_iterations": 2, "max_steps": 3, "max_completion_length": 20, "save_rollouts": False}
    base |= {"learning_rate": 1e-4} if algorithm == "RLOO" else {}  # larger, every ratio leaves every range
    ends = {}
    for settings in [{}, *effects]:
        trainer = trained(tmp_path, algorithm=algorithm, **{**base, **settings})
        end = torch.cat([value.flatten() for value in weights(trainer).values()])
        for other, other_end in ends.items():
            assert not torch.equal(end, other_end), f"{settings} does what {other} does"
        ends[str(settings)] = end


def test_two_sided_clipping_reaches_the_rule(tmp_path):
    """Of no effect in a few steps: the ratio of bad tokens rarely climbs."""
    one = torch.ones(1, 1)
    surrogate = make(tmp_path, delta=1.5).args.clip_rule()(torch.log(2 * one), -one, -one)
    assert surrogate.loss_BT.item() == pytest.approx(1.5)


def test_the_entropy_bonus_follows_the_entropy(tmp_path):
    """Entropies start at ln 100 = 4.6. Below the target the weight climbs by delta; above, it falls and rests."""
    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_coef_delta": 0.01, "max_steps": 3}
    up = trained(tmp_path, entropy_target=9.0, entropy_coef_max=0.03, **adaptive)
    assert history(up, "entropy_coef") == pytest.approx([0.02, 0.03, 0.03])
    down = trained(tmp_path, entropy_target=1.0, **adaptive)
    assert history(down, "entropy_coef") == pytest.approx([0.02, 0.0, 0.0])
    assert down.entropy.coef == pytest.approx(0.0, abs=1e-9)
    assert history(up, "entropy")[0] == pytest.approx(4.6, abs=0.1)


def test_kl_in_the_reward_by_hand(tmp_path):
    """Advantages without scaling: reward - beta KL minus their mean over the group, KL in nats of the completion."""
    reference = causal_lm(seed=1)
    trainer = make(
        tmp_path, beta=0.7, kl_placement="reward", scale_rewards=False, max_steps=1, arguments={"ref_model": reference}
    )
    policy = causal_lm()
    trainer.train()
    table, rows = rollouts_of(tmp_path), []
    for prompt, ids, reward in zip(
        table["prompt"], table["completion_ids"], table["reward_early_letters"], strict=True
    ):
        start = tokenizer()(prompt)["input_ids"]
        whole = torch.tensor([start + ids])
        gains = []
        for model in (policy, reference):
            with torch.no_grad():
                logprobs = model(input_ids=whole).logits[0].log_softmax(-1)
            gains.append(sum(float(logprobs[len(start) - 1 + i, token]) for i, token in enumerate(ids)))
        rows.append(reward - 0.7 * (gains[0] - gains[1]))
    groups = torch.tensor(rows).view(-1, 4)
    assert table["advantage"] == pytest.approx((groups - groups.mean(1, keepdim=True)).flatten().tolist(), abs=1e-3)


def test_dynamic_sampling_stops_at_its_cap(tmp_path):
    never = {"reward_funcs": lambda completions, **_: [0.0] * len(completions), "max_steps": 1}
    trainer = make(tmp_path, dynamic_sampling=True, dynamic_sampling_max_rounds=3, **never)
    calls = []
    inner = trainer.source.draw
    trainer.source.draw = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    trainer.train()
    assert len(calls) == 3
    assert trainer.rollouts.state.position == 6


def test_dynamic_sampling_fills_the_rollout(tmp_path):
    def sometimes(prompts, completions, **columns):
        return [e if p[0] in "afk" else 0.0 for p, e in zip(prompts, early_letters(completions), strict=True)]

    few = trained(tmp_path / "a", reward_funcs=sometimes, max_steps=1)
    refill = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 9}
    many = trained(tmp_path / "b", reward_funcs=sometimes, max_steps=1, **refill)
    assert history(few, "frac_reward_zero_std")[0] > history(many, "frac_reward_zero_std")[0] == 0


def test_rollouts_of_another_engine_with_masked_tokens(tmp_path):
    def environment(rows, trainer):
        count = len(rows)
        return Rollout(
            prompts=[row["prompt_ids"] for row in rows], completions=[[5, 6, 7]] * count,
            logprobs=[[-4.0, 0.0, -4.0]] * count, masks=[[1, 0, 1]] * count,
            rewards=[float(i % 4) for i in range(count)],
        )  # fmt: skip

    trainer = trained(tmp_path, reward_funcs=None, arguments={"rollout_func": environment}, max_steps=1)
    assert history(trainer, "reward") == [1.5]
    assert history(trainer, "grad_norm")[0] > 0
    assert rollouts_of(tmp_path)["reward_reward"][:4] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_generations": 3}, r"num_generations=3: must divide the completions of a rollout, .* = 8; 2, 4, 8 do"),
        ({"num_generations": 16}, r"num_generations=16: must divide .* = 8; 2, 4, 8 do"),
        ({"steps_per_generation": 3}, "steps_per_generation=3: an optimizer step"),
        ({"steps_per_generation": 4, "generation_batch_size": 8}, "generation_batch_size implies"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon=0.1"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta=2.0"),
        ({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False}, "kl_estimator='k1'"),
        ({"beta": 0.1, "kl_placement": "reward", "use_bias_correction_kl": True}, "use_bias_correction_kl=True"),
        ({"beta": 0.1, "kl_placement": "reward", "multi_objective_aggregation": "normalize_then_sum"}, "kl_placement"),
        ({"advantage": "batch", "scale_rewards": "none"}, "scale_rewards='none'"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps=5: no effect"),
        ({"dynamic_sampling": True, "dynamic_sampling_max_rounds": 1}, "dynamic_sampling=True: has no effect"),
        ({"reward_timeout": [1.0, 2.0]}, "reward_timeout="),
        ({"reward_weights": [math.nan]}, "reward_weights="),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"rows": {"train": prompts()}}, r"with the splits .train. \(8 rows\): pass one of them"),
        ({"rows": [{"prompt": "a b"}] and iter(())}, "a tuple_iterator, which can be read only once"),
        ({"reward_funcs": None}, "reward_funcs: give"),
        ({"arguments": {"ref_model": "x"}}, "ref_model: beta=0"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(settings, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        make(tmp_path, **settings)


def test_plain_training_arguments_will_do(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, report_to="none")
    trainer = trl.GRPOTrainer(causal_lm(), early_letters, args, prompts(), processing_class=tokenizer())
    assert trainer.args.num_generations == 8


def test_completions_are_printed(tmp_path, capsys):
    trained(tmp_path, log_completions=True, log_unique_prompts=True, num_completions_to_print=1, max_steps=1)
    shown = capsys.readouterr().out
    assert "early_letters" in shown
    assert "step 1" in shown


def test_evaluation_samples_as_often_as_asked(tmp_path):
    evaluation = {"a": prompts().select([0]), "b": prompts().select([1, 2])}
    trainer = make(tmp_path, arguments={"eval_dataset": evaluation}, num_generations_eval=3)
    result, again = trainer.evaluate(), trainer.evaluate()
    assert result["eval_a_loss"] == pytest.approx(-result["eval_a_reward"])
    assert {k: v for k, v in result.items() if "reward" in k} == {k: v for k, v in again.items() if "reward" in k}
    assert 0 < result["eval_b_completions/mean_length"] <= 6


# -- resuming ----------------------------------------------------------------------------------


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_steps": 4}
    whole = trained(tmp_path / "whole", **{**settings, "save_strategy": "no"})
    trained(tmp_path / "torn", **settings)
    (tmp_path / "torn" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "torn" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step"')
    resumed = make(tmp_path / "torn", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss") == history(whole, "loss")
    assert same_weights(whole, resumed)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"num_generations": 2}, "num_generations=2: the checkpoint stands in the midst of a rollout .* with 4"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size=8: .* with 4"),
        ({"num_iterations": 1}, "num_iterations=1: .* with 2"),
        ({"gradient_accumulation_steps": 1, "steps_per_generation": 1}, "steps_per_generation=1: .* with 2"),
        ({"beta": 0.1}, "beta=0.1: .* with beta=0"),
    ],
)
def test_a_rollout_is_used_up_with_the_settings_that_made_it(changed, what, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_steps": 4}
    trained(tmp_path, **{**settings, "max_steps": 2})
    refused = make(tmp_path, **{**settings, **changed})
    before, drawn = str(refused.extra_state()), torch.get_rng_state()
    with pytest.raises(ValueError, match=what):
        refused.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert str(refused.extra_state()) == before  # a refused resume changes nothing
    assert torch.equal(torch.get_rng_state(), drawn)
    resumed = make(tmp_path, **{**settings, **changed})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_every_case_of_the_suite_is_reached():
    assert {case.trainer for case in CASES.values()} >= {"GRPOTrainer", "RLOOTrainer"}


def documented_recipes():
    text = (Path(__file__).parents[2] / "docs" / "on_policy.md").read_text()
    table = text.split("| algorithm | options of `GRPOConfig` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if "=" in line]
    return [(name.strip(), options.split("`")[1].replace("...", "2")) for name, options in rows]


@pytest.mark.parametrize(("name", "options"), documented_recipes())
def test_documented_recipes_train(name, options, tmp_path):
    trainer = trained(tmp_path, max_steps=1, **eval(f"dict({options})"))
    assert len(history(trainer, "loss")) == 1
