"""Online DPO: which of two completions is better, the scale of an epoch, and the arguments of other releases."""

import logging

import pytest
import torch
from conformity import causal_lm, early_letters, history, prompts, reward_model, tokenizer, weights
from datasets import Dataset
from test_self_sampling import make, rollouts_of

import trl
from trl.trainer.online_dpo_trainer import by_name

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
ENDED, CUT = [5, 2], [6, 7]
"""completions with and without the end token, 2"""


def first_is_better(completion_ids, **columns):
    """0.5 for what begins with 5, and 1.5 for what begins with 6."""
    return [ids[0] - 4.5 for ids in completion_ids]


# -- which is better ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "pair", "preference"),
    [
        (None, (ENDED, CUT), [-1, 1]),
        (0.5, (ENDED, CUT), [-1, 1]),  # 0.5 against 1.5 - 0.5
        (1.0, (ENDED, CUT), [0, 0]),  # 0.5 against 1.5 - 1: undecided
        (1.5, (ENDED, CUT), [1, -1]),  # 0.5 against 1.5 - 1.5
        (1.5, ([5, 7], CUT), [-1, 1]),  # both lose it
        (1.5, ([5, 2], [6, 2]), [-1, 1]),  # none does
    ],
)
@pytest.mark.parametrize("told", [False, True])
def test_a_completion_without_end_may_lose_its_pair(penalty, pair, preference, told, tmp_path):
    """told: the rollouts say themselves which completions were cut; else their tokens do."""

    def made(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [list(pair[i % 2]) for i in range(len(ids))]
        cut = {"truncated": [one[-1] != 2 for one in completions]} if told else {}
        return {"prompt_ids": ids, "completion_ids": completions, **cut}

    given = {"reward_funcs": first_is_better, "rollout_func": made}
    make("OnlineDPO", tmp_path, arguments=given, missing_eos_penalty=penalty).train()
    assert rollouts_of(tmp_path)["preference"] == preference * 2


def test_a_reward_model_by_its_folder_is_the_object(tmp_path):
    folder = tmp_path / "rm"
    reward_model(seed=3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    given = {"reward_model": reward_model(seed=3), "reward_processing_class": tokenizer()}
    runs = [
        make("OnlineDPO", tmp_path / "a", max_steps=2, reward_model_path=str(folder)),
        make("OnlineDPO", tmp_path / "b", max_steps=2, arguments=given),
    ]
    for run in runs:
        run.train()
    assert history(runs[0], "loss") == history(runs[1], "loss")
    assert history(runs[0], "reward") == history(runs[1], "reward")
    assert all(torch.equal(one, weights(runs[1])[name]) for name, one in weights(runs[0]).items())


def test_a_path_beside_an_object_is_said_to_do_nothing(tmp_path, caplog):
    folder = str(tmp_path / "rm")
    reward_model().save_pretrained(folder)
    model = type(reward_model()).from_pretrained(folder)
    with caplog.at_level(logging.WARNING, "trl"):
        for judge in (model, [model, early_letters]):
            make("OnlineDPO", tmp_path, reward_model_path=folder,
                 arguments={"reward_funcs": judge, "reward_processing_class": tokenizer()})  # fmt: skip
        said = [line for line in caplog.messages if line.startswith("reward_model_path=")]
        assert not said
        make("OnlineDPO", tmp_path, reward_model_path=folder, arguments={"reward_funcs": early_letters})
    said = [line for line in caplog.messages if line.startswith("reward_model_path=")]
    assert said == [f"reward_model_path={folder!r}: has no effect, as reward_funcs are given"]


JUDGES = """
def last(prompts, pairs):
    return [1] * len(pairs)

class Last:
    judge = staticmethod(last)
"""


@pytest.mark.parametrize("name", ["last", "Last"])
def test_a_judge_by_its_name_in_a_module(name, tmp_path, monkeypatch):
    (tmp_path / "judges_of_test.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    make("OnlineDPO", tmp_path, judge=f"judges_of_test:{name}").train()
    assert rollouts_of(tmp_path)["preference"] == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"judge": print, "reward_model": early_letters}, {}, "^judge: reward_model orders the completions already"),
        ({"judge": print}, {"reward_model_path": "a/b"}, "^reward_model_path='a/b': a judge orders the completions"),
        ({}, {"judge": "a:b", "reward_model_path": "a/b"}, "^reward_model_path='a/b': a judge orders the completions"),
        (
            {},
            {"reward_model_path": "repetition"},
            "^reward_model_path='repetition': there is no such folder; give that",
        ),
        ({}, {"reward_model_path": "module:name"}, "^reward_model_path='module:name': there is no such folder"),
        ({"judge": dict}, {}, r"^judge: dict is a class; give an object, dict\(\)"),
        ({"reward_model": causal_lm()}, {}, "^reward_model: LlamaForCausalLM is a language model and gives no rewards"),
        ({"reward_funcs": [early_letters, causal_lm()]}, {}, "^reward_funcs: LlamaForCausalLM is a language model"),
        ({"judge": print}, {"judge": "a:b"}, "^judge: the config has judge='a:b'; give one of them"),
        ({"judge": print}, {"missing_eos_penalty": 1.0}, "^missing_eos_penalty=1.0: a judge gives no rewards"),
        ({}, {"judge": "no_such_module:b"}, "^judge='no_such_module:b': No module named 'no_such_module'"),
        ({"reward_model": early_letters, "reward_funcs": early_letters}, {}, "^reward_model: an older name of"),
        ({"reward_funcs": early_letters, "compute_metrics": print}, {}, "^compute_metrics: .*; leave it out"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("OnlineDPO", tmp_path, arguments=arguments, **settings)


# -- the scale of an epoch ---------------------------------------------------------------------


SCHEDULE = {"beta": [0.1, 3.0, 0.5], "num_train_epochs": 3, "max_steps": -1, "lr_scheduler_type": "constant"}


def test_the_scale_is_that_of_the_epoch_in_a_resumed_run_too(tmp_path):
    """Eight prompts, two a step: four steps an epoch. The run is cut in the second epoch, after step 6."""

    def made(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[ENDED, CUT][i % 2] for i in range(len(ids))]}

    def run(scales, **settings):
        given = {"reward_funcs": first_is_better, "rollout_func": made}
        trainer = make("OnlineDPO", tmp_path, arguments=given, **{**SCHEDULE, **settings})
        epoch = trainer.epoch

        def noted():
            scales.append(trainer.args.beta_at(epoch()))
            return epoch()

        trainer.epoch = noted
        return trainer

    scales, later = [], []
    whole, resumed = run(scales, save_strategy="steps", save_steps=6), run(later)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert scales == [0.1] * 4 + [3.0] * 4 + [0.5] * 4
    assert later == scales[6:]
    assert len(history(whole, "loss")) == 12
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)


def test_a_stream_has_no_epochs(tmp_path):
    rows, given = prompts().to_iterable_dataset(), {"reward_funcs": early_letters}
    with pytest.raises(ValueError, match=r"^beta=\[0\.1, 0\.2\]: one for each epoch, and a stream has none"):
        make("OnlineDPO", tmp_path, rows, arguments=given, beta=[0.1, 0.2])
    make("OnlineDPO", tmp_path, rows, arguments=given, beta=[0.1])


# -- arguments of other releases ---------------------------------------------------------------


def test_arguments_by_position_in_both_orders(tmp_path):
    config, model, judge = trl.OnlineDPOConfig(output_dir=str(tmp_path), report_to="none"), causal_lm(), reward_model()
    assert by_name([model, judge, config, "rows"], {}) == {
        "model": model, "reward_funcs": judge, "args": config, "train_dataset": "rows",
    }  # fmt: skip
    assert by_name([model, None, judge, None, config, None, "rows"], {}) == {
        "model": model, "ref_model": None, "reward_funcs": judge, "judge": None, "args": config, "data_collator": None,
        "train_dataset": "rows",
    }  # fmt: skip
    other = causal_lm(seed=1)
    assert by_name([model, other, judge], {"args": config}) == {
        "model": model, "ref_model": other, "reward_funcs": judge, "args": config,
    }  # fmt: skip
    assert by_name([config], {"model": model}) == {"args": config, "model": model}
    with pytest.raises(TypeError, match="got model by position and by name"):
        by_name([model, judge, config], {"model": other})
    with pytest.raises(ValueError, match=r"^model: none was given"):
        trl.OnlineDPOTrainer(args=config, judge=print)
    with pytest.raises(TypeError, match="takes 10 arguments by position, got 11"):
        by_name([model, judge, config, *[None] * 8], {})


def test_the_forms_of_other_releases_train_alike(tmp_path):
    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_new_tokens": 6, "max_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "beta": 0.5,
    }  # fmt: skip
    ids = [{"input_ids": tokenizer()(row["prompt"])["input_ids"]} for row in prompts()]

    def run(form):
        args, rows = trl.OnlineDPOConfig(**settings), prompts()
        model, other, judge = causal_lm(), causal_lm(seed=1), reward_model(seed=3)
        named = {"train_dataset": rows, "processing_class": tokenizer(), "reward_processing_class": tokenizer()}
        first = {"model": model, "ref_model": other, "reward_model": judge}
        given, kept = {
            "names": ((), {**first, "args": args, **named}),
            "order": ((model, other, judge, None, args, None, rows, None, tokenizer(), tokenizer()), {}),
            "half": ((model, other), {"reward_funcs": judge, "judge": None, "args": args, **named}),
            "config first": ((args,), {**first, **named}),
            "tokens": ((), {**first, "args": args, **named, "train_dataset": Dataset.from_list(ids)}),
            "list": ((), {**first, "args": args, **named, "train_dataset": ids}),
        }[form]
        trainer = trl.OnlineDPOTrainer(*given, **kept)
        trainer.train()
        assert trainer.ref_model is other
        return history(trainer, "loss")

    first = run("names")
    assert all(run(form) == first for form in ("order", "half", "config first", "tokens", "list"))


def test_the_scales_on_a_command_line():
    parser = trl.TrlParser((trl.OnlineDPOConfig,))
    for words, scales in ((["0.3"], 0.3), (["0.1", "0.2"], [0.1, 0.2])):
        (args,) = parser.parse_args_into_dataclasses(["--beta", *words], look_for_args_file=False)
        assert args.beta == scales
    assert parser.parse_args_into_dataclasses([], look_for_args_file=False)[0].beta == 0.1
