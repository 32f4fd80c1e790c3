"""Data sets in other forms than those of `datasets`: taken, or refused in one line before training."""

import pandas as pd
import pytest
import torch
from conformity import CASES, build, causal_lm, history, tokenizer

import trl


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def with_rows(case, folder, rows):
    own = CASES[case]
    settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                "seed": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}  # fmt: skip
    return getattr(trl, own.trainer)(
        model=own.model(),
        args=getattr(trl, own.config)(output_dir=str(folder), **settings, **own.settings),
        train_dataset=rows,
        processing_class=tokenizer(),
        **own.arguments(),
    )


FORMS = {
    "pandas": lambda rows: pd.DataFrame(rows.to_list()), "arrow": lambda rows: rows.data.table,
    "torch": lambda rows: Rows(rows.to_list()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "kto", "grpo"])
def test_rows_in_another_form_train_alike(case, form, tmp_path):
    """A torch Dataset of raw pairs ended the run without a step; a table of pandas failed with KeyError: 2."""
    wanted = build(case, tmp_path, max_steps=1)
    wanted.train()
    trainer = with_rows(case, tmp_path, FORMS[form](CASES[case].rows()))
    trainer.train()
    assert history(trainer, "loss") == pytest.approx(history(wanted, "loss"), abs=1e-6)


def test_a_torch_data_set_of_tokenised_rows_goes_through(tmp_path):
    rows = Rows([{"input_ids": [5, 6, 7]}] * 4)
    assert with_rows("sft", tmp_path, rows).train_dataset is rows
    pairs = Rows([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}] * 4)
    assert with_rows("dpo-sigmoid", tmp_path, pairs).train_dataset is pairs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("trl-lib/rows", "the train data set is the text 'trl-lib/rows': load it first"),
        (iter([{"text": "a"}]), "the train data set is a list_iterator, which can be read only once"),
        (({"text": x} for x in "ab"), "the train data set is a generator, which can be read only once: pass `list"),
    ],
)
def test_what_holds_no_rows_is_refused(rows, message, tmp_path):
    for case in ("sft", "grpo"):
        with pytest.raises(ValueError, match=message):
            with_rows(case, tmp_path, rows)
    with pytest.raises(ValueError, match="the eval data set is the text 'rows'"):
        trl.SFTTrainer(
            causal_lm(), trl.SFTConfig(output_dir=str(tmp_path), report_to="none"), train_dataset=CASES["sft"].rows(),
            eval_dataset="rows", processing_class=tokenizer(),
        )  # fmt: skip
