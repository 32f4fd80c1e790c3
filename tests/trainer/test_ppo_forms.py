"""The form of PPO of releases 0.8 to today: its table, its meaning, and that it is the one PPO."""

import copy
import dataclasses
import logging

import pytest
import torch
import transformers as t
from datasets import Dataset
from ppo_cases import COMMON, batch, close, lora
from transformers import HfArgumentParser, TrainerCallback

from trl import AutoModelForCausalLMWithValueHead, ModelConfig, PPOConfig, PPOTrainer, PPOv2Config, ScriptArguments
from trl.data.any_text import visible
from trl.data.records import Rollout
from trl.rollout.rewards import TokenRewards
from trl.trainer import ppo_forms
from trl.trainer.ppo_today import print_samples

PROMPTS = [{"prompt": text} for text in ("a b", "c", "d e f", "g h", "i j k")]
TODAY = {
    "per_device_train_batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 2, "learning_rate": 1e-3,
    "response_length": 4, "total_episodes": 12, "stop_token": "eos", "kl_coef": 0.1, "temperature": 0.8, "seed": 3,
    "save_strategy": "no", "num_sample_generations": 0, "disable_tqdm": True,
}  # fmt: skip
OLDER = {
    "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3, "max_new_tokens": 4, "steps": 12,
    "init_kl_coef": 0.1, "adap_kl_ctrl": False, "temperature": 0.8, "seed": 3, "anneal_learning_rate": True,
    "ratio_threshold": float("inf"),
}  # fmt: skip
"""the same in the form of release 0.7.7"""


def language_model(seed=0):
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def scorer(seed=5):
    torch.manual_seed(seed)
    return t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1))


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def todays(tokenizer, folder, *, reward_model=lengths, call=None, **fields):
    args = PPOConfig(output_dir=str(folder), **{**TODAY, **fields})
    given = {"model": language_model(), "ref_model": language_model(1), "value_model": scorer(2)}
    given |= {"reward_model": reward_model, **(call or {})}
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(PROMPTS),
        **given,
    )


def older(tokenizer, **fields):
    def wrap(model):
        return AutoModelForCausalLMWithValueHead.from_pretrained(model)

    return PPOTrainer(
        PPOConfig(**{**OLDER, **fields}), wrap(language_model()), wrap(language_model(1)), tokenizer,
        Dataset.from_list(PROMPTS), value_model=scorer(2), reward_funcs=lengths,
    )  # fmt: skip


def plain(stats):
    """The numbers of a step without its times."""
    return {name: torch.as_tensor(value).float() for name, value in stats.items() if not name.startswith("time/")}


# --- one PPO ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [("k1", "kl"), ("k3", "k3")], ids=["k1", "k3"])
def test_both_forms_give_equal_statistics_of_a_step(tiny_tokenizer, tmp_path, estimator):
    new = todays(tiny_tokenizer, tmp_path, kl_estimator=estimator[0], whiten_rewards=True)
    torch.manual_seed(0)
    theirs = plain(new.step(*batch()))
    old = older(tiny_tokenizer, kl_penalty=estimator[1], whiten_rewards=True)
    torch.manual_seed(0)
    ours = plain(old.step(*batch()))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_both_forms_make_the_same_run(tiny_tokenizer, tmp_path):
    new, old = todays(tiny_tokenizer, tmp_path), older(tiny_tokenizer)
    seen = {}
    for name, trainer in (("new", new), ("old", old)):
        t.set_seed(3)
        steps = seen[name] = []
        trainer.train(callback=lambda step, stats, batch, steps=steps: steps.append((plain(stats), batch["response"])))
    assert len(seen["new"]) == 3
    for (ours, texts), (theirs, other) in zip(seen["old"], seen["new"], strict=True):
        assert texts == other
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    rates = [float(stats["ppo/learning_rate"]) for stats, _ in seen["new"]]
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])  # linear over the 3 updates


def test_optimizer_steps_are_counted_as_in_that_form(tiny_tokenizer, tmp_path):
    """10 episodes in batches of 1 x 2 x 2 are 3 updates, of 3 passes with 2 optimizer steps each."""
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_ppo_epochs": 3}
    trainer = todays(tiny_tokenizer, tmp_path, total_episodes=10, **fields)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert (trainer.state.global_step, len(steps)) == (3, 18)


@pytest.mark.parametrize(
    ("fields", "updates"),
    [
        ({"total_episodes": None, "num_train_epochs": 2}, 3),  # 2 x 5 prompts by 4
        ({"total_episodes": None, "max_steps": 7}, 7),
        ({"total_episodes": 1}, 1),
    ],
)
def test_how_long_a_run_is(tiny_tokenizer, tmp_path, fields, updates):
    assert todays(tiny_tokenizer, tmp_path, **fields).config.total_ppo_epochs == updates


# --- what its fields mean -----------------------------------------------------------------------------------------


def shaped(trainer, scores, responses):
    return trainer._shaped(torch.tensor(scores), [torch.tensor(ids) for ids in responses]).tolist()


def test_a_missing_end_is_subtracted(tiny_tokenizer, tmp_path):
    """Release 0.7.7's form puts the penalty in the score's place, and so did `non_eos_penalty`."""
    responses = [[5, 2], [5, 6], [5, 7]]
    new = todays(tiny_tokenizer, tmp_path, missing_eos_penalty=1.0)
    assert shaped(new, [0.5, 0.5, 3.0], responses) == [0.5, -0.5, 2.0]
    new = todays(tiny_tokenizer, tmp_path, missing_eos_penalty=1.0, stop_token=None, stop_token_id=7)
    assert shaped(new, [0.5, 0.5, 3.0], responses) == [0.5, -0.5, 3.0]
    new = todays(tiny_tokenizer, tmp_path, non_eos_penalty=True, penalty_reward_value=-4)
    assert shaped(new, [0.5, 0.5, 3.0], responses) == [0.5, -4.0, -4.0]
    old = older(tiny_tokenizer, missing_eos_penalty=1.0)
    assert shaped(old, [0.5, 0.5, 3.0], responses) == [0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("fields", "ends"),
    [({"stop_token": None}, ()), ({}, (2,)), ({"stop_token": None, "stop_token_id": 7}, (7,))],
    ids=["none", "eos", "id"],
)
def test_what_ends_a_response(tiny_tokenizer, tmp_path, fields, ends):
    trainer = todays(tiny_tokenizer, tmp_path, response_length=30, temperature=5.0, **fields)
    assert trainer.source.params(None).stop_token_ids == ends
    batch = trainer._rollout([{"prompt": "a"}] * 4, trainer._rewards())
    for ids in (row.tolist() for row in batch["responses"]):
        assert len(ids) == 30 or ids[-1] in ends
        assert not set(ids[:-1]) & set(ends)


def test_a_reward_model_reads_the_tokens_at_the_last_one():
    model = scorer()
    rollout = Rollout([[3, 4], [5, 6, 7], [8]], [[9, 2], [10], [11, 12, 13]], [[]] * 3, [[1] * 2, [1], [1] * 3])
    rewards = TokenRewards(model, "cpu", tokens=6)(rollout, ["", "", ""], {})
    with torch.no_grad():
        alone = [
            float(model(torch.tensor([p + c])).logits[0, 0])
            for p, c in zip(rollout.prompts, rollout.completions, strict=True)
        ]
    close(rewards.scores_BF[:, 0], alone)


def test_a_token_that_the_reward_model_lacks(tiny_tokenizer):
    rollout = Rollout([[3]], [[250]], [[]], [[1]])
    with pytest.raises(ValueError, match=r"reward_model: it has 100 tokens, and the policy wrote token 250; give its"):
        TokenRewards(scorer(), "cpu")(rollout, [""], {})


def test_one_model_as_reward_and_critic(tiny_tokenizer, tmp_path):
    model = scorer()
    trainer = todays(tiny_tokenizer, tmp_path, call={"reward_model": model, "value_model": model}, total_episodes=4)
    before = trainer._token_rewards.model.score.weight.clone()
    trainer.train()
    assert torch.equal(before, trainer._token_rewards.model.score.weight)
    assert not torch.equal(before, trainer.value_model.score.weight)


def test_metrics_have_todays_names(tiny_tokenizer, tmp_path):
    trainer = todays(tiny_tokenizer, tmp_path, total_episodes=4, missing_eos_penalty=2.0)
    stats = trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["objective/kl"] == pytest.approx(float(stats["objective/kl"]))
    assert logs["objective/non_score_reward"] == pytest.approx(-0.1 * float(stats["objective/kl"]), rel=1e-4)
    assert logs["objective/rlhf_reward"] == pytest.approx(logs["objective/scores"] + logs["objective/non_score_reward"])
    assert logs["loss/value_avg"] == pytest.approx(float(stats["ppo/loss/value"]) / 0.1)
    assert (logs["episode"], logs["lr"], logs["step"]) == (4, 1e-3, 1)
    assert logs["val/num_eos_tokens"] <= 4


def test_fields_that_a_callback_changes_reach_the_next_step(tiny_tokenizer, tmp_path):
    class Schedule(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.args.kl_coef, trainer.args.num_ppo_epochs, trainer.args.response_length = 0.7, 1, 2

    trainer = todays(tiny_tokenizer, tmp_path, call={"callbacks": [Schedule()]}, total_episodes=8)
    seen = []
    trainer.train(callback=lambda step, stats, batch: seen.append((float(stats["objective/kl_coef"]), batch)))
    assert [coefficient for coefficient, _ in seen] == [0.1, 0.7]
    assert trainer.config.ppo_epochs == 1
    assert max(map(len, seen[1][1]["responses"])) <= 2


# --- around a run -------------------------------------------------------------------------------------------------


def test_callbacks_samples_and_evaluation(tiny_tokenizer, tmp_path, capsys):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            control.should_training_stop = True

    call = {"callbacks": [Stop()], "eval_dataset": Dataset.from_list(PROMPTS[:3]), "reward_model": scorer()}
    trainer = todays(tiny_tokenizer, tmp_path, call=call, eval_strategy="steps", eval_steps=2, num_sample_generations=3,
                     per_device_eval_batch_size=2)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    assert capsys.readouterr().out.count("completions") == 2  # a table after each of the updates
    whole = trainer.generate_completions()
    assert [len(column) for column in whole.values()] == [3, 3, 3]
    assert whole["query"] == [row["prompt"] for row in PROMPTS[:3]]
    mean = sum(whole["score"]) / 3
    assert trainer.evaluate() == {"eval_objective/scores": pytest.approx(mean)}
    assert len(trainer.generate_completions(sampling=True)["score"]) == 2


@pytest.mark.parametrize("said", ["\ud800", "\x1b[2J\x1b]0;title\x07", "[bold]x[/nothing]"])
def test_any_response_is_shown(said, capsys):
    print_samples({"query": ["q"], "model response": [said], "score": [0.5]})
    assert visible(said) in capsys.readouterr().out


def test_checkpoints_and_the_saved_model(tiny_tokenizer, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    trainer = todays(tiny_tokenizer, tmp_path / "a", total_episodes=16, **fields)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    again = todays(tiny_tokenizer, tmp_path / "a", total_episodes=16, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.state.global_step == 4
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    trainer.save_model(tmp_path / "saved")
    saved, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(saved.lm_head.weight, trainer.model.pretrained_model.lm_head.weight)


def test_an_adapter_is_its_own_reference(tiny_tokenizer, tmp_path):
    call = {"peft_config": lora(), "ref_model": None}
    trainer = todays(tiny_tokenizer, tmp_path, call=call, total_episodes=4)
    before = copy.deepcopy(trainer.model.pretrained_model.get_base_model().lm_head.weight)
    trainer.train()
    assert trainer.ref_model is None
    assert abs(trainer.state.log_history[0]["objective/kl"]) < 1e-5
    assert torch.equal(before, trainer.model.pretrained_model.get_base_model().lm_head.weight)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


# --- the table of the forms ---------------------------------------------------------------------------------------


def test_every_field_of_today_is_in_a_table():
    """Fields of `TrainingArguments` are acted on, named as without effect, translated, or refused."""
    of_arguments = {entry.name for entry in dataclasses.fields(ppo_forms.PostTrainingConfig)}
    own = set(ppo_forms.ONLY_TODAY) - of_arguments
    assert own == {
        "num_ppo_epochs", "num_mini_batches", "total_episodes", "response_length", "stop_token_id", "kl_coef",
        "kl_estimator", "non_eos_penalty", "penalty_reward_value", "num_sample_generations", "reward_model_path",
        "sft_model_path", "model_adapter_name", "ref_adapter_name", "local_rollout_forward_batch_size",
        "ds3_gather_for_generation",
    }  # fmt: skip
    assert of_arguments >= ppo_forms.READ
    assert of_arguments >= ppo_forms.CHANGES_NUMBERS
    assert not ppo_forms.READ & ppo_forms.CHANGES_NUMBERS


def test_which_form_a_config_has():
    assert PPOConfig().form is None
    assert PPOConfig(batch_size=4).form == ppo_forms.OLDER
    assert (
        PPOConfig(output_dir="o").form
        == PPOConfig(weight_decay=0.1).form
        == PPOv2Config("x", kl_coef=0).form
        == "today"
    )
    new, old = PPOConfig(output_dir="o"), PPOConfig(steps=8)
    assert (new.seed, new.learning_rate, new.temperature, new.save_total_limit) == (42, 3e-6, 0.7, None)
    assert (old.seed, old.learning_rate, old.temperature, old.save_total_limit) == (0, 1e-5, 1.0, 2)
    assert PPOConfig(output_dir="o", temperature=1.0, seed=0).temperature == 1.0
    changed = dataclasses.replace(new, per_device_train_batch_size=2)
    assert (changed.form, changed.learning_rate) == ("today", 3e-6)
    assert new.device == torch.device("cpu")
    assert new.eval_strategy == "no"
    with pytest.raises(AttributeError, match="'PPOConfig' object has no attribute 'device'"):
        _ = old.device


def test_a_parser_reads_both_forms():
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    line = "--output_dir o --stop_token eos --total_episodes 8 --missing_eos_penalty 1.0 --eval_strategy steps"
    config = parser.parse_args_into_dataclasses(line.split())[1]
    assert (config.form, config.total_episodes, config.learning_rate) == ("today", 8, 3e-6)
    config = parser.parse_args_into_dataclasses(["--batch_size", "8", "--ppo_epochs", "2"])[1]
    assert (config.form, config.batch_size, config.learning_rate) == (ppo_forms.OLDER, 8, 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 4, "num_ppo_epochs": 2}, r"batch_size: the form of release 0\.7\.7; num_ppo_epochs: that of 0"
         r".*batch_size is per_device_train_batch_size \* gradient_accumulation_steps \* num_mini_batches there"),
        ({"output_dir": "o", "ppo_epochs": 2, "eval_strategy": "steps"}, r"ppo_epochs: .*; eval_strategy: .*num_ppo"),
        ({"output_dir": "o", "steps": 8}, r"save_steps=None, output_dir='o': checkpoints need both, or neither"),
        ({"stop_token": "eos", "stop_token_id": 3}, r"stop_token_id=3: stop_token='eos' names one too"),
        ({"kl_estimator": "k2"}, r"kl_estimator='k2': choose 'k1' or 'k3'"),
        ({"num_ppo_epochs": 0}, r"num_ppo_epochs=0: give a whole number of at least 1"),
        ({"total_episodes": 4, "max_steps": 2}, r"max_steps=2: total_episodes=4 says the length too"),
        ({"ref_adapter_name": "ref"}, r"ref_adapter_name='ref': the reference of another adapter: load it"),
        ({"non_eos_penalty": True, "missing_eos_penalty": 1.0}, r"non_eos_penalty=True: missing_eos_penalty is"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5\.0: PPO does not act on it; leave it out"),
        ({"warmup_ratio": 2.0}, r"warmup_ratio=2\.0: give a share of the steps"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**fields)


def test_what_has_no_effect_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        PPOConfig(output_dir="o", dataloader_num_workers=2, ddp_bucket_cap_mb=9)
    assert "dataloader_num_workers=2, ddp_bucket_cap_mb=9: PPO does not read this" in caplog.text


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        ({"batch_size": 4}, {"reward_model": lengths}, r"reward_model: of the form .*, and batch_size of"),
        ({"num_ppo_epochs": 1}, {"dataset": PROMPTS}, r"dataset: of the form of release 0\.7\.7, and num_ppo_epochs"),
        ({"num_ppo_epochs": 1}, {"model": 1, "policy": 2}, r"`model` and `policy` are two names of one argument"),
        ({"num_ppo_epochs": 1}, {}, r"model: got NoneType; give a causal language model, a folder or a Hub name"),
        ({"optim": "lion_32bit"}, {"policy": "tiny"}, r"optim='lion_32bit': PPO makes AdamW alone; give the optimizer"),
        ({"report_to": "mlflow"}, {"policy": "tiny"}, r"report_to=\['mlflow'\]: choose 'wandb', 'tensorboard'"),
        ({"model_adapter_name": "a"}, {"policy": "tiny"}, r"model_adapter_name='a': the model has no such adapter"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_wrong_calls_are_named(tiny_tokenizer, config, call, message):
    call = {name: language_model() if value == "tiny" else value for name, value in call.items()}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(config=PPOConfig(**config), processing_class=tiny_tokenizer, **call)
