"""Distillation: whose completions are learned, what the divergence is by hand, which teachers and rows are taken."""

import json
import logging

import pytest
import torch
from conformity import answered, causal_lm, config, history, prompts, reward_model, tokenizer
from datasets import Dataset
from test_self_sampling import make, rollouts_of
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM

import trl
from trl.data.records import Rollout
from trl.trainer.distillation_trainer import DataSource, MixedSource, ReadableSource

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
TEACHER = {"max_completion_length": 3, "per_device_train_batch_size": 2}


def logprobs(model, start, ids):
    """Log-distributions that predict the ids behind the start. [T, V]"""
    places = slice(len(start) - 1, len(start) + len(ids) - 1)
    with torch.no_grad():
        return model(input_ids=torch.tensor([start + ids])).logits[0, places].float().log_softmax(-1)


def forward_kl(student_TV, teacher_TV):
    return (teacher_TV.exp() * (teacher_TV - student_TV)).sum(-1)


def mean_over(table, divergence, teacher):
    student, values = causal_lm(), []
    for prompt, ids in zip(table["prompt"], table["completion_ids"], strict=True):
        start = tokenizer()(prompt)["input_ids"]
        values.append(divergence(logprobs(student, start, ids), logprobs(teacher, start, ids)))
    return float(torch.cat(values).mean())


# -- whose completions -------------------------------------------------------------------------


def test_the_teachers_own_completions_are_learned(tmp_path):
    """Sequence-level distillation; the student's own would be those of a student with the teacher's weights."""
    given = {"teacher_model": causal_lm(seed=7)}
    trainer = make("GKD", tmp_path / "a", arguments=given, lmbda=0.0, seq_kd=True, beta=0.0, temperature=1.0)
    trainer.train()
    own = make("GKD", tmp_path / "b", model=causal_lm(seed=7), arguments={"teacher_model": causal_lm()}, lmbda=1.0,
               temperature=1.0)  # fmt: skip
    own.train()
    table = rollouts_of(tmp_path / "a")
    assert table["completion_ids"] == rollouts_of(tmp_path / "b")["completion_ids"]
    assert history(trainer, "loss")[0] == pytest.approx(mean_over(table, forward_kl, causal_lm(seed=7)), rel=1e-4)


class Marked:
    """A source whose completions name it and the prompt; the second token was not sampled."""

    def __init__(self, name, **metadata):
        self.name, self.metadata, self.seen = name, metadata, []

    def draw(self, rows, group=1, seed=None, places=None):
        self.seen += places or []
        ids = [[self.name, row["number"]] for row in rows for _ in range(group)]
        metadata = {key: [value] * len(ids) for key, value in self.metadata.items()}
        return Rollout([[1]] * len(ids), ids, [], [[1, 0]] * len(ids), metadata=metadata)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_mixture_keeps_order_masks_and_places(share):
    own, others = Marked(5, truncated=True, histories="h"), Marked(6, truncated=False)
    rows = [{"number": number} for number in range(16)]
    rollout = MixedSource(own, others, share).draw(rows, 2, seed=3, places=list(range(100, 116)))
    assert [ids[1] for ids in rollout.completions] == [number for number in range(16) for _ in range(2)]
    assert rollout.masks == [[1, 0]] * 32
    assert rollout.metadata["truncated"] == [ids[0] == 5 for ids in rollout.completions]
    assert ("histories" in rollout.metadata) == (share == 1.0)
    assert sorted(own.seen + others.seen) == list(range(100, 116))
    assert {0.0: 0, 0.5: 1, 1.0: 2}[share] == (len(own.seen) > 0) + (len(own.seen) == 16)


def test_a_token_that_one_model_lacks_ends_a_completion():
    rollout = Rollout([[1]] * 4, [[5, 6], [5, 9], [9, 5], []], [], [[1, 1], [1, 1], [1, 1], []], texts=[])

    class Given:
        def draw(self, *asked):
            return rollout

    made = ReadableSource(Given(), 9).draw([])
    assert made.completions == [[5, 6], [5], [], []]
    assert made.masks == [[1, 1], [1], [], []]
    assert made.metadata["truncated"] == [False, True, True, False]


@pytest.mark.parametrize("rows", [(160, 100), (100, 160)])
@pytest.mark.parametrize("settings", [{"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}])
def test_heads_of_other_sizes(rows, settings, tmp_path):
    student, teacher = map(of_size, rows)
    trainer = make("GKD", tmp_path, model=student, arguments={"teacher_model": teacher}, max_steps=2, **settings)
    trainer.train()
    trainer.evaluate(prompts())
    assert all(token < 100 for ids in rollouts_of(tmp_path)["completion_ids"] for token in ids)


def test_the_settings_say_whose_they_are(tmp_path, caplog):
    given = {"teacher_model": causal_lm(seed=7)}
    taken = [
        make("GKD", tmp_path, answered(), arguments=given, **one).source
        for one in ({"lmbda": 1.0}, {"lmbda": 0.5}, {"lmbda": 0.5, "seq_kd": True})
    ]
    assert not isinstance(taken[0], MixedSource)
    assert isinstance(taken[1].others, DataSource)
    assert taken[2].others.sampler.model is not taken[2].own.sampler.model
    with caplog.at_level(logging.WARNING, "trl"):
        trl.GKDConfig(output_dir=str(tmp_path), seq_kd=True, lmbda=1.0, report_to="none")
    assert caplog.messages == ["seq_kd=True: has no effect with lmbda=1, where the student completes every prompt"]


# -- the divergence ----------------------------------------------------------------------------


def given_rollouts(prompts, trainer):
    """Three tokens each, of which the second is a tool's."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": [[4, 5, 2]] * len(ids), "env_mask": [[1, 0, 1]] * len(ids)}


@pytest.mark.parametrize(
    ("beta", "divergence"),
    [(0.0, forward_kl), (1.0, lambda student_TV, teacher_TV: forward_kl(teacher_TV, student_TV))],
)
def test_the_ends_by_hand_where_the_policy_spoke(beta, divergence, tmp_path):
    given = {"teacher_model": causal_lm(seed=7), "rollout_func": given_rollouts}
    trainer = make("Distillation", tmp_path, arguments=given, beta=beta)
    trainer.train()
    table = rollouts_of(tmp_path)
    assert table["completion_ids"] == [[4, 5, 2]] * len(table)
    kept = mean_over(table, lambda *both: divergence(*both)[[0, 2]], causal_lm(seed=7))
    assert history(trainer, "loss")[0] == pytest.approx(kept, rel=1e-4)
    assert kept != pytest.approx(mean_over(table, divergence, causal_lm(seed=7)), rel=1e-3)


def test_a_teacher_keeps_its_precision(tmp_path):
    teacher = causal_lm(seed=7).bfloat16()
    given = {"teacher_model": teacher, "rollout_func": given_rollouts}
    trainer = make("Distillation", tmp_path, arguments=given, beta=0.0)
    trainer.train()
    assert {weight.dtype for weight in trainer.teacher_model.parameters()} == {torch.bfloat16}
    kept = mean_over(rollouts_of(tmp_path), lambda *both: forward_kl(*both)[[0, 2]], teacher)
    assert history(trainer, "loss")[0] == pytest.approx(kept, rel=2e-2)


# -- teachers ----------------------------------------------------------------------------------


def of_size(rows):
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config(vocab_size=rows))


def in_folder(folder, model, tokens):
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_teacher_with_other_tokens_is_refused(by_name, tmp_path):
    folder = in_folder(tmp_path / "teacher", causal_lm(seed=7), byte_tokenizer())
    teacher = folder if by_name else AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"^teacher_model: token \d+ is .* to its tokenizer and .* to the student's"):
        make("Distillation", tmp_path, arguments={"teacher_model": teacher}, **TEACHER)


def test_a_teacher_with_one_more_token_is_taken(tmp_path):
    more = word_tokenizer()
    more.add_tokens(["<new>"])
    folder = in_folder(tmp_path / "teacher", of_size(len(more)), more)
    make("Distillation", tmp_path, arguments={"teacher_model": folder}, **TEACHER).train()


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (lambda: of_size(50), {}, "vocabularies of 50 \\(teacher\\) and 100 \\(student\\) for a tokenizer of 100"),
        (reward_model, {}, "LlamaForSequenceClassification has no language-model head .* a causal language model"),
        (lambda: "no/such/folder", {}, "could not load a model from 'no/such/folder': there is no such folder"),
        (lambda: causal_lm(seed=7), {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
         "^teacher_model_init_kwargs={'dtype': 'bfloat16'}: the teacher is loaded already; leave it out"),
        (lambda: causal_lm(seed=7), {"teacher_model_revision": "v1"},
         "^teacher_model_revision='v1': the teacher is loaded already; leave it out"),
        (lambda: "x", {"teacher_model_revision": "v1", "teacher_model_init_kwargs": {"revision": "v2"}},
         "^teacher_model_revision='v1': teacher_model_init_kwargs has revision='v2'; say it once"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_be_learned_from_is_named(teacher, settings, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        make("Distillation", tmp_path, arguments={"teacher_model": teacher()}, **settings)


def test_the_student_with_an_adapter_is_no_teacher_of_its_own(tmp_path):
    from peft import LoraConfig

    model = causal_lm()
    given = {"teacher_model": model, "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match=r"^teacher_model: it is the student itself; load it a second time"):
        make("Distillation", tmp_path, model=model, arguments=given)


def test_a_teacher_of_few_positions_is_named(tmp_path):
    teacher = AutoModelForCausalLM.from_config(config(max_position_embeddings=4))
    given = {"teacher_model": teacher, "rollout_func": given_rollouts}
    with pytest.raises(ValueError, match=r"^teacher_model: its context holds 4 tokens, and a prompt with its comple"):
        make("Distillation", tmp_path, arguments=given).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_model_revision": "v1"},
        {"teacher_model_init_kwargs": {"revision": "v1"}},
        {"teacher_model_init_kwargs": json.dumps({"revision": "v1"}), "teacher_model_revision": "v1"},
    ],
)
def test_a_teacher_by_revision(settings, tmp_path, monkeypatch):
    told = []

    def load(source, auto_class, keywords, **how):
        told.append((source, keywords))
        return causal_lm(seed=7)

    monkeypatch.setattr("trl.trainer.distillation_trainer.load_model", load)
    make("GKD", tmp_path, answered(), teacher_model_name_or_path=str(tmp_path), **settings)
    assert told == [(str(tmp_path), {"revision": "v1"})]


# -- rows --------------------------------------------------------------------------------------


def said(role, content):
    return {"role": role, "content": content}


TURNS = [said("user", "hi"), said("assistant", "no"), said("user", "so"), said("assistant", "yes")]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def chatty(tmp_path, rows, chat_tokenizer, **settings):
    def model(seed):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(vocab_size=len(chat_tokenizer), max_position_embeddings=256))

    settings = {"lmbda": 0.0, "max_completion_length": 16, "per_device_train_batch_size": 2, **settings}
    return make("GKD", tmp_path, rows, model(0), {"teacher_model": model(1)}, chat_tokenizer, **settings)


@pytest.mark.parametrize(
    ("column", "turns", "prompt"), [("messages", TURNS, TURNS[:3]), ("conversations", SHARED, TURNS[:1])]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_last_message_of_a_conversation_is_learned(column, turns, prompt, stream, tmp_path, chat_tokenizer):
    rows = Dataset.from_list([{column: turns, "id": number} for number in range(4)])
    rows = rows.to_iterable_dataset() if stream else rows
    trainer = chatty(tmp_path, rows, chat_tokenizer)
    first = next(iter(trainer.train_dataset))
    assert (first["prompt"], first["completion"], first["id"]) == (prompt, [said("assistant", "yes")], 0)
    trainer.train()
    table = rollouts_of(tmp_path)
    assert [chat_tokenizer.decode(ids) for ids in table["completion_ids"]] == ["yes<|im_end|>"] * len(table)


class OfTorch(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize(
    "rows", [Dataset.from_list, list, tuple, OfTorch, lambda rows: Dataset.from_list(rows).to_iterable_dataset()]
)
def test_a_conversation_that_ends_with_a_question(rows, tmp_path, chat_tokenizer):
    asked = rows([{"messages": TURNS}, {"messages": TURNS[:3]}])
    with pytest.raises(ValueError, match=r"row 1 of the train data set: column 'messages' ends with the role 'user'"):
        chatty(tmp_path, asked, chat_tokenizer)
    for settings in ({"lmbda": 1.0}, {"seq_kd": True}):
        trainer = chatty(tmp_path, asked, chat_tokenizer, **settings)
        assert [row["prompt"] for row in trainer.train_dataset] == [TURNS[:3]] * 2


def test_an_answer_to_nothing_is_named(tmp_path, chat_tokenizer):
    with pytest.raises(ValueError, match="row 0 of the train data set: column 'messages' has no message before"):
        chatty(tmp_path, [{"messages": TURNS[-1:]}], chat_tokenizer)


def test_completions_that_are_missing_are_named_at_construction(tmp_path):
    given = {"teacher_model": causal_lm(seed=7), "eval_dataset": prompts()}
    with pytest.raises(ValueError, match=r"^lmbda=0\.5: needs a column `completion`, and the eval data set has prompt"):
        make("GKD", tmp_path, answered(), arguments=given)
    with pytest.raises(ValueError, match=r"^train_dataset: on-policy training needs prompts"):
        trl.GKDTrainer(causal_lm(), causal_lm(seed=7), trl.GKDConfig(output_dir=str(tmp_path), report_to="none"),
                       processing_class=tokenizer())  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a b", "completion": None}, "column 'completion' of the prompt 'a b': it should be a text"),
        ({"prompt": "a b", "completion": [said("assistant", "c")]}, "column 'completion' of the prompt 'a b'"),
        ({"prompt": TURNS[:1], "completion": []}, "column 'completion' of the prompt"),
    ],
)
def test_a_completion_that_cannot_be_read_is_named(row, message, chat_tokenizer):
    with pytest.raises(ValueError, match=message):
        DataSource(chat_tokenizer, 8, None).draw([{**row, "prompt_ids": [1]}])


@pytest.mark.parametrize("rows", [list, Dataset.from_list])
def test_a_completion_that_is_missing_is_named_at_construction(rows, tmp_path):
    given = rows([*answered().to_list()[:3], {"prompt": "a", "completion": None}])
    with pytest.raises(ValueError, match=r"^row 3 of the train data set: column 'completion' is None; give a text"):
        make("GKD", tmp_path, given, arguments={"teacher_model": causal_lm(seed=7)})
    make("GKD", tmp_path, given, arguments={"teacher_model": causal_lm(seed=7)}, seq_kd=True)


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "formatting_func"])
def test_arguments_that_nothing_reads_are_named(name, tmp_path):
    given = {"teacher_model": causal_lm(seed=7)}
    make("Distillation", tmp_path, arguments={**given, name: None})
    with pytest.raises(ValueError, match=f"^{name}: .*; leave it out$"):
        make("Distillation", tmp_path, arguments={**given, name: print})
