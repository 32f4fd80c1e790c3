"""A method of another release that a subclass overrides is called, or construction says what to override instead."""

from functools import cache

import conformity
import pytest
import torch
from conformity import history, weights
from ppo_cases import batch, causal
from tokenizers_for_tests import word_tokenizer

import trl
from trl.trainer.overrides import CALLED, TABLE, Refused, known_to, table_of

PPO_NAMES = ("compute_rewards", "compute_advantages", "loss", "_kl_penalty")
CALLS = [
    ("dpo-sigmoid", "dpo_loss"), ("dpo-sigmoid", "get_batch_loss_metrics"), ("dpo-sigmoid", "concatenated_forward"),
    ("dpo-sigmoid", "concatenated_inputs"), ("dpo-sigmoid", "get_batch_logps"), ("dpo-sigmoid", "tokenize_row"),
    ("dpo-sigmoid", "build_tokenized_answer"), ("dpo-sigmoid", "compute_reference_log_probs"),
    ("dpo-sigmoid", "store_metrics"), ("dpo-sigmoid", "_prepare_dataset"), ("dpo-sigmoid", "compute_loss"),
    ("dpo-many", "dpo_loss"), ("dpo-state", "dpo_loss"), ("kto", "kto_loss"), ("kto", "get_batch_loss_metrics"),
    ("kto-bco", "kto_loss"), ("kto", "_prepare_dataset"), ("sft", "_prepare_dataset"), ("sft", "compute_loss"),
    ("reward", "compute_loss"), ("reward", "_prepare_dataset"), ("grpo", "_calculate_rewards"),
    ("rloo", "_calculate_rewards"), ("grpo", "compute_loss"), ("prm", "compute_loss"), ("orpo", "compute_loss"),
]  # fmt: skip
REFUSES = {
    "dpo-sigmoid": "_compute_loss compute_ref_log_probs process_row",
    "orpo": "get_batch_loss_metrics concatenated_forward get_batch_logps odds_ratio_loss tokenize_row store_metrics",
    "kto": "forward bco_loss get_batch_logps compute_reference_log_probs _compute_loss",
    "sft": "_prepare_packed_dataloader _prepare_non_packed_dataloader tokenize_row _compute_loss",
    "grpo": "_compute_loss _compute_advantages _generate _generate_single_turn _generate_and_score_completions "
    "_get_per_token_logps _get_per_token_logps_and_entropies _get_train_sampler",
    "online-dpo": "_generate generate_on_policy_outputs",
}
OTHER_NUMBERS = ("tokenize_row", "build_tokenized_answer")
"""which tokenise prompt and answer as one text, as release 0.7.7 did"""


def passing_on(kind, name, seen):
    """A subclass whose method counts its calls and passes them on."""
    static = isinstance(kind.__dict__.get(name), staticmethod)

    def method(self, *args, **kwargs):
        seen.append(name)
        base = super(own, self)
        return getattr(base, name)(*args, **kwargs)

    def plain(*args, **kwargs):
        seen.append(name)
        return getattr(kind, name)(*args, **kwargs)

    own = type("Own", (kind,), {name: staticmethod(plain) if static else method})
    return own


def built(case, folder, monkeypatch, methods, **settings):
    """The case's trainer, of a subclass with these methods."""
    name = conformity.CASES[case].trainer
    kind = methods if isinstance(methods, type) else type("Own", (getattr(trl, name),), methods)
    monkeypatch.setattr(trl, name, kind)
    return conformity.build(case, folder, optim="sgd", **settings)


@cache
def plain_run(case, folder, **settings):
    trainer = conformity.build(case, folder, max_steps=1, optim="sgd", **settings)
    trainer.train()
    return weights(trainer), history(trainer, "loss"), trainer.state.log_history[0]


@pytest.mark.parametrize(("case", "name"), CALLS)
def test_an_override_is_called_and_super_gives_the_same_numbers(case, name, tmp_path, monkeypatch):
    expected, loss, logged = plain_run(case, tmp_path / "plain")
    seen = []
    kind = passing_on(getattr(trl, conformity.CASES[case].trainer), name, seen)
    trainer = built(case, tmp_path, monkeypatch, kind, max_steps=1)
    trainer.train()
    assert seen, f"{name} was not called"
    if name in OTHER_NUMBERS:
        return
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4)
    assert history(trainer, "loss") == pytest.approx(loss, rel=1e-4)
    shown = trainer.state.log_history[0]
    common = {key for key in logged if key in shown and not key.endswith(("runtime", "per_second", "step_time"))}
    if name not in ("concatenated_forward", "concatenated_inputs", "get_batch_logps"):
        assert common >= {key for key in logged if key.startswith(("rewards/", "logps/"))}
    for key in common - {"logits/chosen", "logits/rejected"}:
        assert shown[key] == pytest.approx(logged[key], rel=1e-3, abs=1e-5), key


REFUSED = [(case, name) for case, names in REFUSES.items() for name in names.split()]


@pytest.mark.parametrize(("case", "name"), REFUSED)
def test_another_is_refused_with_the_way_out(case, name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"^Own\.{name}: training never calls it here") as caught:
        built(case, tmp_path, monkeypatch, {name: lambda self, *args, **kwargs: None})
    outcome = table_of(getattr(trl, conformity.CASES[case].trainer))[name]
    assert isinstance(outcome, Refused)
    assert str(caught.value).endswith(outcome.way_out)


def test_the_table_is_walked():
    tried = {name for _, name in [*CALLS, *REFUSED]} | set(PPO_NAMES) | {"prepare_dataloader"}
    tried |= {"batched_forward_pass", "train_minibatch", "prepare_model_inputs"}
    tried |= {"concatenated_inputs", "build_tokenized_answer", "cpo_loss", "simpo_loss"}  # of the reference-free too
    assert {name for methods in TABLE.values() for name in methods} == tried
    for kind, methods in TABLE.items():
        held = getattr(trl, kind, None)
        for name, outcome in methods.items():
            assert held is None or outcome != CALLED or callable(getattr(held, name)), (kind, name)


# -- where an override may stand ---------------------------------------------------------------------------------


def test_on_the_trainer_itself(tmp_path):
    trainer = conformity.build("dpo-sigmoid", tmp_path, max_steps=1)
    ours = trainer.dpo_loss
    trainer.dpo_loss = lambda *logps: (ours(*logps)[0] + 1000, *ours(*logps)[1:])
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(1000 + 0.6931, abs=1e-2)


def test_in_the_place_of_our_method(tmp_path, monkeypatch):
    ours = trl.DPOTrainer.dpo_loss
    monkeypatch.setattr(trl.DPOTrainer, "dpo_loss", lambda self, *x: (ours(self, *x)[0] * 0 + 7, *ours(self, *x)[1:]))
    trainer = conformity.build("dpo-sigmoid", tmp_path, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert history(trainer, "loss") == [7.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())  # no gradient


def test_in_a_mixin(tmp_path, monkeypatch):
    class Refusable:
        def _generate(self, prompts):
            return None

    before = type("Before", (Refusable, trl.GRPOTrainer), {})
    behind = type("Behind", (trl.GRPOTrainer, Refusable), {})
    with pytest.raises(ValueError, match=r"^Before\._generate: "):
        built("grpo", tmp_path, monkeypatch, before)
    built("grpo", tmp_path, monkeypatch, behind)  # which overrides nothing of another release either


def test_one_that_is_set_later_is_refused_when_training_begins(tmp_path):
    trainer = conformity.build("grpo", tmp_path)
    trainer._compute_loss = lambda model, inputs: None
    with pytest.raises(ValueError, match=r"GRPOTrainer\._compute_loss: .*policy_objective\(model, batch\)"):
        trainer.train()


def test_a_method_that_another_override_calls_is_the_users_matter(tmp_path, monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        return (logits.float() ** 2).mean()

    trainer = built(
        "grpo", tmp_path, monkeypatch, {"compute_loss": compute_loss, "_compute_loss": _compute_loss}, max_steps=1
    )
    before = weights(trainer)
    trainer.train()
    assert 0 < history(trainer, "loss")[0] < 1
    assert not all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_keywords_of_another_release_are_left_out():
    given = {"args": 1, "packing": True}
    assert known_to(lambda dataset, args: None, given) == {"args": 1}
    assert known_to(lambda dataset, **more: None, given) == given


# -- losses of pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda losses: losses, "dpo_loss: it gave Tensor; give"),
        (lambda losses: (losses[:-1], losses, losses), "dpo_loss: its losses have shape"),
    ],
)
def test_a_wrong_answer_is_named(given, message, tmp_path, monkeypatch):
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, {"dpo_loss": lambda self, chosen, *more: given(chosen)})
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_what_super_is_given_counts(tmp_path, monkeypatch):
    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, *rest):
        return super(kind, self).dpo_loss(chosen * 0 + ref_chosen + 3, rejected, ref_chosen, rejected.detach(), *rest)

    kind = type("Own", (trl.DPOTrainer,), {"dpo_loss": dpo_loss})
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, kind, max_steps=1, beta=0.5)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(0.2014, abs=1e-4)  # -log sigmoid(0.5 * 3)
    assert history(trainer, "rewards/chosen")[0] == pytest.approx(1.5)


def test_one_that_asks_is_told_each_loss(tmp_path, monkeypatch):
    asked = []

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, loss_type="sigmoid", model_output=None):
        asked.append(loss_type)
        given = super(kind, self).dpo_loss(chosen, rejected, ref_chosen, ref_rejected, loss_type, model_output)
        return given

    kind = type("Own", (trl.DPOTrainer,), {"dpo_loss": dpo_loss})
    settings = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 2.0], "max_steps": 1}
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, kind, **settings)
    trainer.train()
    assert asked == ["sigmoid", "hinge"]
    assert history(trainer, "loss")[0] == pytest.approx(0.6931 + 2.0, abs=1e-3)


def test_the_reference_is_the_users(tmp_path, monkeypatch):
    def compute_reference_log_probs(self, padded_batch):
        assert padded_batch["chosen_input_ids"].shape == padded_batch["chosen_labels"].shape
        rows = len(padded_batch["chosen_input_ids"])
        return torch.zeros(rows), torch.zeros(rows)

    methods = {"compute_reference_log_probs": compute_reference_log_probs}
    for folder, ahead in (("at once", False), ("ahead", True)):
        with monkeypatch.context() as patch:
            trainer = built(
                "dpo-sigmoid", tmp_path / folder, patch, methods, max_steps=1, precompute_ref_log_probs=ahead, beta=0.1
            )
            trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["rewards/chosen"] == pytest.approx(0.1 * logged["logps/chosen"], rel=1e-4)


def test_a_reference_before_training_by_super(tmp_path, monkeypatch):
    expected, _, _ = plain_run("dpo-sigmoid", tmp_path / "plain")
    kind = passing_on(trl.DPOTrainer, "compute_reference_log_probs", [])
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, kind, max_steps=1, precompute_ref_log_probs=True)
    trainer.train()
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4)


def test_the_batch_of_release_0_7_7(tmp_path):
    trainer = conformity.build("dpo-sigmoid", tmp_path)
    rows = next(iter(trainer.get_train_dataloader()))
    assert rows["rejected_input_ids"].shape == rows["rejected_attention_mask"].shape
    forward = trainer.concatenated_forward(trainer.model, rows)
    expected = trainer.policy_sums(trainer.model, rows)
    torch.testing.assert_close(forward[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("ld_alpha", 0.5), ("use_weighting", True)])
def test_weights_of_tokens_need_our_forward(name, value, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"^{name}={value!r}: weighs single tokens"):
        built("dpo-sigmoid", tmp_path, monkeypatch, {"concatenated_forward": lambda *args: None}, **{name: value})


def test_metrics_of_the_user_are_logged(tmp_path, monkeypatch):
    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        loss, metrics = super(kind, self).get_batch_loss_metrics(model, batch, train_eval)
        return 2 * loss, {**metrics, "mine": 4.0}

    kind = type("Own", (trl.DPOTrainer,), {"get_batch_loss_metrics": get_batch_loss_metrics})
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, kind, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(2 * 0.6931, abs=1e-2)
    assert history(trainer, "mine") == [4.0]
    assert trainer.evaluate()["eval_mine"] == 4.0


def test_rows_of_the_user(tmp_path, monkeypatch):
    def tokenize_row(self, feature, model=None):
        row = super(kind, self).tokenize_row(feature, model)
        cut = [*row["chosen_input_ids"][:-1], 5]
        return {**row, "chosen_input_ids": cut, "chosen_labels": [*row["chosen_labels"][:-1], 5]}

    kind = type("Own", (trl.DPOTrainer,), {"tokenize_row": tokenize_row})
    trainer = built("dpo-sigmoid", tmp_path, monkeypatch, kind)
    assert {row["chosen_ids"][-1] for row in trainer.train_dataset} == {5}


# -- unpaired completions ----------------------------------------------------------------------------------------


def test_the_shapes_of_kto(tmp_path, monkeypatch):
    def kto_loss(self, chosen, rejected, kl, ref_chosen, ref_rejected, ref_kl):
        assert len(chosen) + len(rejected) == len(kl) == len(ref_kl) == 4
        assert (len(chosen), len(rejected)) == (len(ref_chosen), len(ref_rejected))
        return torch.cat([chosen, rejected]) * 0 + 5, chosen.detach(), rejected.detach(), torch.zeros(())

    trainer = built("kto", tmp_path, monkeypatch, {"kto_loss": kto_loss}, max_steps=1)
    trainer.train()
    assert history(trainer, "loss") == [5.0]
    logged = trainer.state.log_history[0]
    assert logged["rewards/chosen"] == pytest.approx(logged["logps/chosen"])


# -- data --------------------------------------------------------------------------------------------------------


def test_rows_that_a_user_prepares(tmp_path, monkeypatch):
    named = []

    def own(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        assert (processing_class, args.max_length, packing) == (conformity.tokenizer(), 12, False)
        named.append(dataset_name)
        return dataset.map(lambda row: {"input_ids": processing_class(row["text"])["input_ids"][:3]})

    def fewer(self, dataset, *args, **kwargs):
        return super(kind, self)._prepare_dataset(dataset, *args, **kwargs).select(range(2))

    with monkeypatch.context() as patch:
        trainer = built("sft", tmp_path, patch, {"_prepare_dataset": own}, max_length=12)
    assert named == ["train", "eval"]
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {3}
    kind = type("Own", (trl.SFTTrainer,), {"_prepare_dataset": fewer})
    assert len(built("sft", tmp_path, monkeypatch, kind).train_dataset) == 2


# -- compute_loss ------------------------------------------------------------------------------------------------


def of_the_model(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def of_a_sum(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def of_super(self, model, inputs, num_items_in_batch=None, **kwargs):
    return super(type(self), self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)


def of_super_alone(self, model, inputs, return_outputs=False):
    return super(type(self), self).compute_loss(model, inputs)


def with_outputs(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    loss, outputs = super(type(self), self).compute_loss(model, inputs, return_outputs=True)
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape
    return loss + 0 * outputs.logits.sum()


@pytest.mark.parametrize("own", [of_the_model, of_a_sum, of_super, of_super_alone, with_outputs])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_the_user_is_divided_as_ours(own, accumulation, tmp_path, monkeypatch):
    settings = {"padding_free": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    expected, loss, _ = plain_run("sft", tmp_path / "plain", **settings)
    trainer = built("sft", tmp_path, monkeypatch, {"compute_loss": own}, max_steps=1, **settings)
    trainer.train()
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-3)
    assert history(trainer, "loss") == pytest.approx(loss, rel=1e-4)


def test_an_evaluation_has_the_users_loss(tmp_path, monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 3 * super(kind, self).compute_loss(model, inputs)

    plain = conformity.build("sft", tmp_path).evaluate()["eval_loss"]
    kind = type("Own", (trl.SFTTrainer,), {"compute_loss": compute_loss})
    trainer = built("sft", tmp_path, monkeypatch, kind)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3 * plain, rel=1e-5)


def test_labels_that_a_user_changes_count(tmp_path, monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] > 10, -100)
        outputs = model(**inputs)
        ours = super(kind, self).compute_loss(model, inputs)
        torch.testing.assert_close(ours, outputs.loss, atol=1e-5, rtol=1e-5)
        return ours

    kind = type("Own", (trl.SFTTrainer,), {"compute_loss": compute_loss})
    built("sft", tmp_path, monkeypatch, kind, padding_free=False, max_steps=1).train()


def test_a_packed_batch_says_how_to_get_rows(tmp_path, monkeypatch):
    trainer = built("sft", tmp_path, monkeypatch, {"compute_loss": of_the_model})
    with pytest.raises(ValueError, match=r"^Own\.compute_loss: model\(\*\*inputs\) got a packed .*padding_free=False"):
        trainer.train()


def test_a_nan_of_the_user_stops_the_run(tmp_path, monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super(kind, self).compute_loss(model, inputs) * float("nan")

    kind = type("Own", (trl.SFTTrainer,), {"compute_loss": compute_loss})
    with pytest.raises(Exception, match="step 1"):
        built("sft", tmp_path, monkeypatch, kind).train()


def test_compute_loss_func(tmp_path):
    def smooth(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    expected, loss, _ = plain_run("sft", tmp_path / "plain")
    trainer = conformity.build("sft", tmp_path)
    args, rows = trainer.args, conformity.texts()
    given = {"train_dataset": rows, "processing_class": conformity.tokenizer(), "compute_loss_func": smooth}
    trainer = trl.SFTTrainer(conformity.causal_lm(), args=trl.SFTConfig(**{**plain_settings(args)}), **given)
    trainer.train()
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-3)
    assert history(trainer, "loss") == pytest.approx(loss, rel=1e-4)
    own = type("Own", (trl.SFTTrainer,), {"compute_loss": of_the_model})
    with pytest.raises(ValueError, match=r"^compute_loss_func: compute_loss is overridden too"):
        own(conformity.causal_lm(), args=trl.SFTConfig(**plain_settings(args)), **given)


def plain_settings(args):
    names = ("output_dir", "per_device_train_batch_size", "logging_steps", "learning_rate", "save_strategy", "seed",
             "lr_scheduler_type", "disable_tqdm", "max_length")  # fmt: skip
    return {**{name: getattr(args, name) for name in names}, "max_steps": 1, "report_to": "none", "optim": "sgd"}


# -- rewards of rollouts -----------------------------------------------------------------------------------------


def test_rewards_of_the_user(tmp_path, monkeypatch):
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        assert [row["prompt"] for row in inputs] == prompts
        assert len(prompts) == len(completions) == len(completion_ids_list) == len(inputs)
        assert "wanted" in inputs[0]
        theirs = super(kind, self)._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return theirs * 0 + torch.arange(len(prompts))[:, None]

    kind = type("Own", (trl.GRPOTrainer,), {"_calculate_rewards": _calculate_rewards})
    trainer = built("grpo", tmp_path, monkeypatch, kind, max_steps=1)
    trainer.train()
    completions = trainer.args.rollout_shape().rows
    names = trainer.reward_func_names
    assert history(trainer, f"rewards/{names[0]}/mean")[0] == pytest.approx((completions - 1) / 2)
    wrong = {"_calculate_rewards": lambda self, inputs, *more: torch.zeros(len(inputs))}
    with pytest.raises(ValueError, match="_calculate_rewards gave scores of shape"):
        built("grpo", tmp_path / "wrong", monkeypatch, wrong).train()


# -- PPO ---------------------------------------------------------------------------------------------------------


def ppo(methods, **fields):
    kind = type("Own", (trl.PPOTrainer,), methods)
    config = trl.PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "ppo_epochs": 2, **fields})
    return kind(config, causal(), tokenizer=word_tokenizer())


def stepped(methods, **fields):
    torch.manual_seed(0)
    trainer = ppo(methods, **fields)
    stats = trainer.step(*batch())
    return trainer, stats


NUMBERS = ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/returns/mean", "ppo/val/mean",
           "ppo/policy/entropy", "ppo/mean_non_score_reward")  # fmt: skip


@pytest.mark.filterwarnings("ignore:No dataset is provided")
@pytest.mark.parametrize("name", PPO_NAMES)
def test_a_piece_of_a_step_is_called_and_super_gives_the_same_numbers(name):
    plain, expected = stepped({})
    seen = []
    kind = passing_on(trl.PPOTrainer, name, seen)
    torch.manual_seed(0)
    trainer = kind(plain_config(), causal(), tokenizer=word_tokenizer())
    stats = trainer.step(*batch())
    assert seen
    for key in NUMBERS:
        assert float(stats[key]) == pytest.approx(float(expected[key]), rel=1e-4, abs=1e-6), key
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def plain_config():
    return trl.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3, ppo_epochs=2)


@pytest.mark.filterwarnings("ignore:No dataset is provided")
def test_what_the_pieces_give_is_learned():
    def compute_advantages(self, values, rewards, mask):
        return values * mask, mask * 0.0, values * mask  # nothing to learn

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        policy, value, stats = trl.PPOTrainer.loss(
            self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        assert logits.shape[:2] == mask.shape == vpreds.shape
        return policy * 0 + 3.0, value * 0, {**stats, "loss/mine": torch.tensor(8.0)}

    trainer, stats = stepped({"compute_advantages": compute_advantages})
    assert stats["ppo/loss/policy"] == pytest.approx(0.0, abs=1e-6)
    trainer, stats = stepped({"loss": loss})
    before = list(causal().parameters())
    assert stats["ppo/loss/total"] == pytest.approx(3.0)
    assert stats["ppo/loss/mine"] == pytest.approx(8.0)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True))
    doubled = {"_kl_penalty": lambda self, logprob, ref_logprob: logprob * 0 + 2.0}
    _, stats = stepped(doubled, init_kl_coef=0.5, adap_kl_ctrl=False)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-1.0)


@pytest.mark.filterwarnings("ignore:No dataset is provided")
@pytest.mark.parametrize("name", ["batched_forward_pass", "train_minibatch", "prepare_model_inputs"])
def test_a_piece_that_no_step_has_is_refused(name):
    own = {name: lambda self, *args, **kwargs: None}
    with pytest.raises(ValueError, match=rf"^Own\.{name}: .*compute_rewards, compute_advantages or loss"):
        ppo(own)
    ppo({**own, "step": lambda self, *args: {}})  # whose own step may call it


@pytest.mark.filterwarnings("ignore:No dataset is provided")
def test_the_exact_kl_and_a_penalty_of_the_user():
    with pytest.raises(ValueError, match=r"^kl_penalty='full': an overridden compute_rewards"):
        ppo({"_kl_penalty": lambda self, *logps: None}, kl_penalty="full")


@pytest.mark.filterwarnings("ignore:No dataset is provided")
def test_a_wrong_shape_is_named():
    wrong = {"compute_rewards": lambda self, scores, logprobs, *more: (logprobs[:, :-1], logprobs)}
    with pytest.raises(ValueError, match=r"^compute_rewards: it gave .*; give tensors of shape"):
        stepped(wrong)


def test_a_loader_of_the_user():
    from datasets import Dataset

    seen = []
    kind = passing_on(trl.PPOTrainer, "prepare_dataloader", seen)
    rows = Dataset.from_dict({"input_ids": [[4, 5], [6, 7], [8, 9], [4, 9]]}).with_format("torch")
    kind(plain_config(), causal(), tokenizer=word_tokenizer(), dataset=rows)
    assert seen == ["prepare_dataloader"]
