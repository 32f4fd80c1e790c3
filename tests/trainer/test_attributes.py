"""Attributes that subclasses and callbacks read or set, and batches that show their rows (faults 15 and 16, L18)."""

import numpy as np
import pytest
import torch
from conformity import build, causal_lm, early_letters, history, tokenizer, unpaired, weights
from ppo_runs import trainer_for
from transformers import TrainerCallback, TrainingArguments

import trl
from trl import create_reference_model

FIELDS = {
    "dpo-sigmoid": ("beta", "loss_type", "max_length", "reference_free", "label_smoothing", "truncation_mode"),
    "orpo": ("beta", "max_length"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    "grpo": ("num_generations", "beta", "temperature", "reward_weights", "max_completion_length", "scale_rewards"),
    "rloo": ("beta", "num_generations"),
    "online-dpo": ("beta", "loss_type", "num_generations"),
    "distillation": ("beta", "lmbda", "temperature"),
}


class Schedule(TrainerCallback):
    """Sets an attribute of the trainer, or of its arguments, after the first step."""

    def __init__(self, name, value, on_args=False):
        self.name, self.value, self.on_args = name, value, on_args

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            setattr(args if self.on_args else self.trainer, self.name, self.value)


def scheduled(case, folder, name, value, on_args=False, **settings):
    trainer = build(case, folder, max_steps=3, **settings)
    schedule = Schedule(name, value, on_args)
    schedule.trainer = trainer
    trainer.add_callback(schedule)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", FIELDS)
def test_fields_are_attributes(case, tmp_path):
    trainer = build(case, tmp_path)
    for name in FIELDS[case]:
        assert getattr(trainer, name) == getattr(trainer.args, name)


def test_other_attributes(tmp_path):
    pairs = build("dpo-sigmoid", tmp_path)
    assert (pairs.is_encoder_decoder, pairs.is_peft_model) == (False, False)
    assert build("dpo-sigmoid", tmp_path, lora=True).is_peft_model
    trainer = build("grpo", tmp_path, temperature=0.7, epsilon=0.3)
    assert trainer.reward_funcs[0] is early_letters
    assert trainer.reward_func_names == ["early_letters"]
    assert trainer.reward_processing_classes == [None]
    assert trainer.ref_model is None
    assert trainer.model.model_tags == ["trl", "grpo"]
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.3, 0.3)
    assert trainer.generation_config.temperature == 0.7
    assert trainer.generation_config.max_new_tokens == trainer.args.max_completion_length
    assert build("grpo", tmp_path, beta=0.1).ref_model is not None
    rloo = build("rloo", tmp_path)
    rloo.epsilon_low = 0.4
    assert (rloo.epsilon_low, rloo.epsilon_high, rloo.args.epsilon_high) == (0.4, 0.4, None)
    rloo.epsilon_high = 0.5
    assert (rloo.args.epsilon, rloo.args.epsilon_high) == (0.4, 0.5)
    assert build("distillation", tmp_path).teacher_model is not None


def test_metrics_that_a_subclass_appends_are_logged(tmp_path):
    class Mine(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for value in (1.0, torch.tensor(4.0)):
                trainer._metrics["train"]["mine"].append(value)

    trainer = build("grpo", tmp_path)
    trainer.add_callback(Mine())
    trainer.train()
    assert history(trainer, "mine") == [2.5, 2.5]


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_is_tagged(lora, tmp_path):
    assert build("sft", tmp_path, lora=lora).model.model_tags == ["trl", "sft"]


CHANGED = [
    ("dpo-sigmoid", "beta", 5.0, {}),
    ("dpo-sigmoid", "loss_type", ["hinge"], {}),
    ("dpo-sigmoid", "label_smoothing", 0.4, {}),
    ("orpo", "beta", 5.0, {}),
    ("kto", "beta", 5.0, {}),
    ("kto", "undesirable_weight", 3.0, {}),
    ("rloo", "beta", 5.0, {"num_iterations": 1}),
    ("grpo", "beta", 5.0, {"beta": 0.1, "num_iterations": 1}),
    ("grpo", "temperature", 2.0, {"num_iterations": 1}),
    ("grpo", "reward_weights", [-3.0], {"num_iterations": 1}),
]


@pytest.mark.parametrize(("case", "name", "value", "settings"), CHANGED)
def test_what_a_callback_sets_counts_from_the_next_step_on(case, name, value, settings, tmp_path):
    plain = build(case, tmp_path, max_steps=3, **settings)
    plain.train()
    changed = scheduled(case, tmp_path, name, value, **settings)
    same, other = ([*zip(history(run, "loss"), history(run, "grad_norm"), strict=True)] for run in (plain, changed))
    assert other[0] == same[0]
    assert other[1:] != same[1:]
    assert getattr(changed.args, name) == value


def test_so_does_what_it_sets_on_the_arguments(tmp_path):
    on_trainer, on_args = (
        scheduled("dpo-sigmoid", tmp_path, "beta", 5.0, on_args=on_args) for on_args in (False, True)
    )
    for name, value in weights(on_trainer).items():
        assert torch.equal(value, weights(on_args)[name])
    first, second = (scheduled("grpo-many", tmp_path, "epsilon_high", 0.5, on_args=flag) for flag in (False, True))
    assert history(first, "grad_norm") == history(second, "grad_norm")


@pytest.mark.parametrize(
    ("case", "name", "value", "message"),
    [
        ("dpo-sigmoid", "beta", -1.0, "beta=-1.0: give a scale >= 0"),
        ("dpo-sigmoid", "loss_type", "none", "Unknown loss type: none"),
        ("dpo-sigmoid", "loss_type", "bco_pair", "bco_pair keeps a mean"),
        ("dpo-sigmoid", "max_length", 7, "max_length=7: the rows are tokenised already"),
        ("grpo", "beta", 0.1, "beta=0.1: the trainer was made with beta=0, which keeps no reference"),
        ("grpo", "num_generations", 2, "num_generations=2: rollouts are divided by it"),
        ("grpo", "epsilon_high", -1.0, "epsilon_high=-1.0: give a number > 0"),
        ("grpo", "reward_weights", [1.0, 2.0], "give one weight for each of the 1 reward functions"),
    ],
)
def test_what_can_have_no_effect_is_refused(case, name, value, message, tmp_path):
    trainer = build(case, tmp_path)
    before = getattr(trainer, name)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        setattr(trainer, name, value)
    assert getattr(trainer, name) == before


def test_a_subclass_may_set_them_early_and_keep_metrics_of_its_own(tmp_path):
    class Mine(trl.KTOTrainer):
        def __init__(self, *args, **kwargs):
            self.beta = 7.0
            assert self.beta == 7.0
            super().__init__(*args, **kwargs)
            self._metrics = {"mine": []}

    trainer = Mine(causal_lm(), args=trl.KTOConfig(str(tmp_path), report_to="none"), train_dataset=unpaired(),
                   processing_class=tokenizer())  # fmt: skip
    assert trainer.beta == 0.1
    assert trainer._metrics == {"mine": []}


def test_a_half_used_rollout_keeps_its_temperature(tmp_path):
    trainer = build("grpo", tmp_path, steps_per_generation=2, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="temperature: a rollout is half used"):
        trainer.temperature = 0.5
    assert trainer.temperature == 1.0


def test_other_reward_functions_judge_the_next_rollout(tmp_path):
    trainer = build("grpo", tmp_path, max_steps=1)

    def longest(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    trainer.reward_funcs, trainer.reward_weights = longest, [2.0]
    trainer.train()
    assert history(trainer, "rewards/longest/mean")
    assert not history(trainer, "rewards/early_letters/mean")


# -- batches ----------------------------------------------------------------------------------


def test_a_batch_shows_its_rows(tmp_path):
    trainer = build("sft", tmp_path, shuffle_dataset=False, train_sampling_strategy="sequential")
    assert set(trainer.train_dataset.column_names) >= {"input_ids"}
    batch = next(iter(trainer.get_train_dataloader()))
    rows = [trainer.train_dataset[i] for i in range(4)]
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = len(row["input_ids"])
        assert ids.tolist() == row["input_ids"] + [0] * (len(ids) - length)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        learned = [i for i, flag in enumerate(row["loss_mask"]) if flag and i > 0]
        assert (labels != -100).nonzero()[:, 0].tolist() == learned
        assert labels[learned].tolist() == [row["input_ids"][i] for i in learned]
    assert list(batch) == ["packed"]  # nothing is made before somebody asks
    assert "labels" in batch
    assert batch.get("nothing") is None
    with pytest.raises(KeyError, match=r"'chosen_ids': this batch holds packed, and input_ids, attention_mask, labels"):
        batch["chosen_ids"]


@pytest.mark.parametrize("case", ["dpo-sigmoid", "kto", "reward", "prm", "grpo"])
def test_every_trainer_has_such_batches(case, tmp_path):
    batch = next(iter(build(case, tmp_path).get_train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].any(1).all()
    if case not in ("reward", "prm"):
        assert (batch["labels"] != -100).any()


def test_pieces_of_a_budget_are_one_batch(tmp_path):
    whole = next(iter(build("sft", tmp_path).get_train_dataloader()))
    cut = next(iter(build("sft", tmp_path, max_tokens_per_microbatch=12).get_train_dataloader()))
    assert "pieces" in cut
    assert sorted(cut["attention_mask"].sum(1).tolist()) == sorted(whole["attention_mask"].sum(1).tolist())
    assert cut["input_ids"].shape == whole["input_ids"].shape


# -- fields of TrainingArguments that read a batch ----------------------------------------------


@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "grpo"])
@pytest.mark.parametrize("how", ["all", "non_padding"])
def test_tokens_are_counted(case, how, tmp_path):
    trainer = build(case, tmp_path, include_num_input_tokens_seen=how, max_steps=2)
    if case == "sft":
        trainer.train()
        tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
        widest = [row["input_ids"] for row in trainer.train_dataset]
        assert trainer.state.num_input_tokens_seen == tokens if how == "non_padding" else tokens <= (
            trainer.state.num_input_tokens_seen) <= 8 * max(map(len, widest))  # fmt: skip
    else:
        trainer.train()
        assert trainer.state.num_input_tokens_seen > 0
    assert trainer.state.total_flos > 0


def test_inputs_reach_compute_metrics(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.inputs)
        return {}

    trainer = build("sft", tmp_path, include_for_metrics=["inputs"])
    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert np.asarray(seen[0]).shape[0] == 3


def test_settings_of_a_plain_config_are_the_trainers(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert build("kto", tmp_path, args=args).beta == 0.1


# -- the config of PPO -------------------------------------------------------------------------


def ppo_step(trainer):
    rows = [torch.tensor([3 + i, 5, 7]) for i in range(4)]
    return trainer.step(rows, [torch.tensor([8 + i, 9]) for i in range(4)], [torch.tensor(0.5 * i) for i in range(4)])


def ppo(**numbers):
    return trainer_for(batch_size=4, mini_batch_size=2, ppo_epochs=1, steps=40, learning_rate=1e-3, **numbers)


def test_the_layers_that_a_reference_shares():
    trainer = ppo()
    assert trainer.shared_layer_parameters == []
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.ref_model = create_reference_model(trainer.model, num_shared_layers=1)
    assert trainer.shared_layer_parameters == names[: next(i for i, n in enumerate(names) if "layers.1." in n)]


def test_ppo_follows_its_kl_controller():
    trainer = ppo()
    ppo_step(trainer)
    trainer.config.target, trainer.config.horizon = 1.0, 8.0
    before = trainer.kl_ctl.value
    stats = ppo_step(trainer)
    assert stats["objective/kl_coef"] == pytest.approx(before)
    error = float(np.clip(stats["objective/kl"] / 1.0 - 1, -0.2, 0.2))
    assert trainer.kl_ctl.value == pytest.approx(before * (1 + error * 4 / 8.0))
    trainer.config.adap_kl_ctrl = False
    before = trainer.kl_ctl.value
    ppo_step(trainer)
    assert trainer.kl_ctl.value == before


@pytest.mark.parametrize("anneals", [False, True])
def test_ppo_follows_its_rate_and_its_length(anneals):
    trainer = ppo(anneal_learning_rate=anneals)
    assert ppo_step(trainer)["ppo/learning_rate"] == pytest.approx(1e-3)
    trainer.config.learning_rate = 1e-2
    assert ppo_step(trainer)["ppo/learning_rate"] == pytest.approx(9e-3 if anneals else 1e-2)
    assert ppo_step(trainer)["ppo/learning_rate"] == pytest.approx(8e-3 if anneals else 1e-2)
    trainer.config.steps = 16
    ppo_step(trainer)
    assert trainer.config.total_ppo_epochs == 4
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0 if anneals else 1e-2)


def test_an_optimizer_of_ones_own_keeps_its_rate():
    trainer = ppo(optimizer=lambda weights: torch.optim.SGD(weights, lr=0.5))
    trainer.config.learning_rate = 1e-2
    with pytest.warns(UserWarning, match=r"learning_rate=0\.01: the optimizer is your own, so it has no effect"):
        assert ppo_step(trainer)["ppo/learning_rate"] == 0.5
