"""What users get wrong is one clear line: which thing, and the way out; nothing half-written."""

import re
import resource

import datasets
import pytest
import torch
from conformity import CASES, build, causal_lm, pairs, reward_model, steps, texts, tokenizer, unpaired
from tokenizers_for_tests import char_tokenizer, word_tokenizer

from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, causal_lm, texts),
    "reward": (RewardTrainer, RewardConfig, reward_model, pairs),
    "dpo": (DPOTrainer, DPOConfig, causal_lm, pairs),
    "orpo": (ORPOTrainer, ORPOConfig, causal_lm, pairs),
    "kto": (KTOTrainer, KTOConfig, causal_lm, unpaired),
    "prm": (PRMTrainer, PRMConfig, None, steps),
}
every = pytest.mark.parametrize("name", TRAINERS)


def start(name, tmp_path, rows=None, model=None, **more):
    trainer, config, build_model, own_rows = TRAINERS[name]
    if model is None:
        from conformity import step_model

        model = (build_model or step_model)()
    settings = more.pop("settings", {})
    more.setdefault("processing_class", tokenizer())
    return trainer(
        model=model, args=config(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, **settings),
        train_dataset=own_rows() if rows is None else rows, **more,
    )  # fmt: skip


def one_line(error):
    return "\n" not in str(error.value)


@every
@pytest.mark.parametrize("part", ["train", "eval"])
def test_empty_data(name, part, tmp_path):
    empty = TRAINERS[name][3]().select([])
    data = {"rows": empty} if part == "train" else {"eval_dataset": empty}
    with pytest.raises(ValueError, match=f"the {part} data set is empty") as error:
        start(name, tmp_path, **data)
    assert one_line(error)


@every
def test_a_missing_column(name, tmp_path):
    rows = datasets.Dataset.from_dict({"quote": ["a b"], "chosen": ["a"]})
    with pytest.raises(ValueError, match="column") as error:
        start(name, tmp_path, rows)
    assert "quote" in str(error.value)  # what is there
    assert one_line(error)


@every
def test_a_row_of_another_kind(name, tmp_path):
    """The last row has None where the others have what the trainer reads."""
    rows = TRAINERS[name][3]().to_list()
    column = {"sft": "text", "kto": "completion", "prm": "completions"}.get(name, "chosen")
    rows[-1] = {**rows[-1], column: None}
    with pytest.raises(ValueError, match=rf"row 7 of the train data set: column '{column}'") as error:
        start(name, tmp_path, datasets.Dataset.from_list(rows))
    assert one_line(error)


@every
def test_a_vocabulary_that_does_not_fit(name, tmp_path):
    with pytest.raises(ValueError, match="highest id is 119, and the model's embedding has 100 rows") as error:
        start(name, tmp_path, processing_class=word_tokenizer(size=120))
    assert one_line(error)


@every
def test_no_model_and_no_tokenizer(name, tmp_path):
    trainer, _, _, rows = TRAINERS[name]
    extra = {"is_encoder_decoder": False} if name == "dpo" else {}
    with pytest.raises(ValueError, match="model: none was given"):
        trainer(train_dataset=rows(), processing_class=tokenizer(), **extra)
    with pytest.raises(ValueError, match="tokenizer: none was given"):
        start(name, tmp_path, processing_class=None)


@pytest.mark.filterwarnings("ignore:.*pad.*")
def test_no_pad_token_is_taken_from_eos(tmp_path):
    own = word_tokenizer(pad=None)
    start("sft", tmp_path, processing_class=own)
    assert own.pad_token == own.eos_token


def test_neither_pad_nor_eos(tmp_path):
    with pytest.raises(ValueError, match="pad") as error:
        start("sft", tmp_path, processing_class=word_tokenizer(pad=None, eos=None))
    assert one_line(error)


def test_no_eos(tmp_path):
    own = char_tokenizer()
    own.eos_token = None
    with pytest.raises(
        ValueError, match=r"no EOS token, so the model could not learn to stop: set `tokenizer\.eos_token`"
    ):
        start("sft", tmp_path, datasets.Dataset.from_dict({"text": ["abc"]}), processing_class=own)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "sft"])
def test_prompts_longer_than_the_model(name, tmp_path):
    """Every answer would be cut away whole."""
    long = " ".join(["a"] * 70)
    rows = {
        "kto": {"prompt": [long, long + " b"], "completion": ["b", "c"], "label": [True, False]},
        "sft": {"prompt": [long], "completion": ["b"]},
    }.get(name, {"prompt": [long], "chosen": ["b"], "rejected": ["c"]})
    with pytest.raises(ValueError, match=r"without a learned token.*raise `max_length`") as error:
        start(name, tmp_path, datasets.Dataset.from_dict(rows))
    assert one_line(error)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "prm"])
def test_max_length_beyond_the_model(name, tmp_path):
    with pytest.warns(UserWarning, match="max_length=65: the model has 64 positions"):
        start(name, tmp_path, settings={"max_length": 65})


@pytest.mark.filterwarnings("ignore:max_length=80:UserWarning")
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "prm", "reward"])
def test_a_row_that_needs_more_than_the_model(name, tmp_path):
    long = " ".join(["a"] * 70)
    rows = {
        "kto": {"prompt": ["a ", "b "], "completion": [long, "c"], "label": [True, False]},
        "sft": {"prompt": ["a "], "completion": [long]},
        "prm": {"prompt": ["a "], "completions": [[long]], "labels": [[True]]},
    }.get(name, {"prompt": ["a "], "chosen": [long], "rejected": ["c"]})
    with pytest.raises(ValueError, match=r"max_length=80: a row has 7\d tokens .* set max_length=64") as error:
        start(name, tmp_path, datasets.Dataset.from_dict(rows), settings={"max_length": 80})
    assert one_line(error)


def test_identical_pairs(tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["b"]})
    with pytest.raises(ValueError, match="the same chosen and rejected tokens"):
        start("dpo", tmp_path, rows)


def test_a_wrong_kind_of_arguments(tmp_path):
    with pytest.raises(ValueError, match="args must be a SFTConfig or TrainingArguments, got dict"):
        SFTTrainer(causal_lm(), args={}, train_dataset=texts(), processing_class=tokenizer())


@pytest.mark.filterwarnings("ignore:You passed a model_id")
def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(OSError, match=r"could not load a model from .*there is no such folder") as error:
        start("sft", tmp_path, model=str(tmp_path / "none"))
    assert one_line(error)


# -- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Files of at most 20 kB: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_saving_to_a_full_disk_changes_nothing(tmp_path, small_files):
    trainer = build("sft", tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    small_files()
    with pytest.raises(OSError, match=r"could not save to .*saved.*nothing there has changed") as error:
        trainer.save_model(str(tmp_path / "saved"))
    assert one_line(error)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    with pytest.raises(OSError, match="could not save to"):
        trainer.save_model(str(tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("limit", [20_000, 100_000])
def test_a_checkpoint_on_a_full_disk_leaves_the_older_ones(limit, tmp_path, small_files):
    """20 kB fails in the weights, 100 kB in the optimizer's state."""

    class FillDisk(__import__("transformers").TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                small_files(limit)

    trainer = build("dpo-state", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(FillDisk())
    with pytest.raises(OSError, match=r"could not save checkpoint-4 .*earlier checkpoints are whole") as error:
        trainer.train()
    assert one_line(error)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2"]
    small_files(10**9)
    resumed = build("dpo-state", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert "trainer_state.json" in files_of(tmp_path / "checkpoint-4")


def test_no_checkpoint_to_resume_from(tmp_path, caplog):
    trainer = build("sft", tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.state.max_steps
    assert f"no whole checkpoint in {tmp_path}: training starts anew" in caplog.text


def test_names_of_the_suite_are_words():
    assert all(re.fullmatch(r"[a-z-]+", name) for name in CASES)
