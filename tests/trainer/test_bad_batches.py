"""C19: what `step` and PPO's prompts are given and no model can read is told with its row."""

from random import Random

import pytest
import torch
from bad_rows import VALUES
from tiny_models import tiny_model
from tokenizers_for_tests import CHATML, byte_tokenizer, word_tokenizer

from trl import IterativeSFTConfig, IterativeSFTTrainer
from trl.rollout.prompts import PromptStream, prompt_ids
from trl.trainer.ppo_trainer import checked_batch, rollout_of

EMBEDDINGS = 300


def one_line(error):
    assert type(error) is ValueError
    assert str(error).isprintable()
    return str(error)


def outcome(call):
    """What the call gives, or the line of its ValueError."""
    try:
        return call(), None
    except ValueError as error:
        return None, one_line(error)


def ppo_step(queries, responses, scores, masks=None):
    queries, responses, scores, masks = checked_batch(2, queries, responses, scores, masks, "cpu")
    return rollout_of(queries, responses, masks, embeddings=EMBEDDINGS)


IDS, TRUE = torch.tensor([5, 6]), torch.tensor([1, 1])
GOOD = {"queries": [IDS, IDS], "responses": [IDS, IDS], "scores": [torch.tensor(1.0)] * 2, "masks": [TRUE, TRUE]}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "queries",
            torch.tensor([5, 300]),
            r"queries\[1\] has the id 300 at entry 1, and the model's embedding has 300",
        ),
        ("responses", torch.tensor([-1, 5]), r"responses\[1\] should be a list of token ids, got -1 at entry 0"),
        ("responses", torch.tensor([2.0, 5.0]), r"responses\[1\] is of torch.float32: give token ids"),
        ("queries", torch.tensor([True, False]), r"queries\[1\] is of torch.bool: give token ids"),
        ("queries", torch.tensor(5), r"queries\[1\] has shape \(\): give one row of tokens"),
        ("queries", torch.ones(2, 2, dtype=torch.long), r"queries\[1\] has shape \(2, 2\)"),
        ("responses", torch.ones(2, device="meta"), r"responses\[1\] is a tensor on the device meta"),
        ("queries", [5, 6], r"Elements in queries must be tensors - got <class 'list'> \(queries\[1\]\)"),
        ("masks", torch.tensor([1, 2]), r"column 'masks\[1\]' should hold 0 or 1 .*, got 2 at entry 1"),
        ("scores", torch.tensor(1j), r"scores\[1\] is of torch.complex64"),
        ("scores", torch.ones(2, 2), r"Scores must be 1-dimensional - got 2 \(scores\[1\]\)"),
    ],
)
def test_ppo_step(name, value, message):
    assert ppo_step(**GOOD).prompts == [[5, 6], [5, 6]]
    with pytest.raises(ValueError, match=message) as caught:
        ppo_step(**{**GOOD, name: [GOOD[name][0], value]})
    one_line(caught.value)


@pytest.mark.parametrize("value", sorted(VALUES))
@pytest.mark.parametrize("name", ["queries", "responses", "scores", "masks"])
def test_ppo_step_of_anything(name, value):
    rollout, refused = outcome(lambda: ppo_step(**{**GOOD, name: [GOOD[name][0], VALUES[value]()]}))
    assert refused is None or name in refused.lower() or "its response (3,)" in refused
    assert rollout is None or all(type(i) is int and 0 <= i < EMBEDDINGS for row in rollout.prompts for i in row)


@pytest.mark.parametrize("value", sorted(VALUES))
@pytest.mark.parametrize("column", ["input_ids", "prompt", "query"])
def test_ppo_prompts_of_anything(column, value):
    tokenizer, rows = byte_tokenizer(CHATML), [{column: VALUES[value]()}]
    stream = PromptStream(rows, seed=0)
    ids, refused = outcome(lambda: [stream.check(0, 1, tokenizer, EMBEDDINGS), prompt_ids(rows[0], tokenizer)][1])
    assert refused is None or column in refused or "has no tokens" in refused
    assert ids is None or (ids.dim() == 1 and int(ids.min()) >= 0 and int(ids.max()) < EMBEDDINGS)


def test_ppo_prompts_are_told_by_their_place():
    rows = [{"prompt": "a"}, {"prompt": "a\ud800"}, {"prompt": "a"}]
    with pytest.raises(ValueError, match=r"row 1 of the train data set: column 'prompt' has half a character"):
        PromptStream(rows, seed=0).check(0, 3, byte_tokenizer(CHATML))
    assert prompt_ids({"input_ids": torch.tensor([[5, 6]])}, word_tokenizer()).tolist() == [5, 6]


@pytest.fixture(scope="module")
def iterative(tmp_path_factory):
    args = IterativeSFTConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), max_steps=400, max_length=32,
        per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="No data collator"):
        return IterativeSFTTrainer(
            tiny_model("llama", vocab_size=EMBEDDINGS), args, processing_class=byte_tokenizer(None)
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": [[5], [5, 300]]},
            r"input_ids\[1\] has the id 300 at entry 1, and the model's embedding has 300",
        ),
        ({"input_ids": [[5], [-1, 5]]}, r"input_ids\[1\] should be a list of token ids, got -1 at entry 0"),
        ({"input_ids": [[5], [True]]}, r"Elements in input_ids must be tensors - got .* of torch.bool, .* in row 1"),
        ({"input_ids": [[5], [2**63]]}, r"Elements in input_ids must be tensors - got <class 'list'> in row 1"),
        ({"input_ids": [[5], [5, 6]], "attention_mask": [[1], [1]]}, r"attention_mask\[1\] .* 2 tokens, it has 1"),
        ({"input_ids": [[5], [5, 6]], "attention_mask": [[1], [1, 7]]}, r"attention_mask\[1\] should hold 0 or 1"),
        ({"input_ids": [[5], [5, 6]], "labels": [[5], [5]]}, r"labels\[1\] has 1 entries for 2 tokens"),
        ({"input_ids": [[5], [5, 6]], "labels": [[5], [-7, 6]]}, r"labels\[1\] should be a list of token ids, got -7"),
        ({"texts": ["a", "b\ud800"]}, r"row 1 of 'text' has half a character"),
        ({"texts": ["a", None]}, r"Elements in 'text' must be strings - got <class 'NoneType'> in row 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:No labels")
def test_iterative_step(iterative, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        iterative.step(**given)
    one_line(caught.value)


@pytest.mark.filterwarnings("ignore:No labels")
def test_iterative_step_of_anything(iterative):
    random = Random(0)
    outcomes = {"right": 0, "refused": 0}
    for _ in range(200):
        given = {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 1]], "labels": [[5, 6], [7, 8]]}
        kind = random.choice([*given, "texts"])
        value = VALUES[random.choice(sorted(set(VALUES) - {"1 MB", "special tokens"}))]()
        given = {"texts": ["a", value]} if kind == "texts" else {**given, kind: [given[kind][0], value]}
        _, refused = outcome(lambda given=given: iterative.step(**given))
        outcomes["right" if refused is None else "refused"] += 1
    assert outcomes["refused"] > outcomes["right"] > 3
    assert all(bool(weight.isfinite().all()) for weight in iterative.model.parameters())
