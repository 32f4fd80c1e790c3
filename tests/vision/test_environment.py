"""Environments that answer with pictures, and prompts with some: what the model is shown, and what is learned."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pytest
import torch
from families import data_url, model_of, picture, processor_of

from trl.data.pictures import Album, read_by, reader_of
from trl.data.records import Completion
from trl.environment import ChatEnvironment
from trl.environment.text_history import TextHistory
from trl.environment.turns import SampledTurns
from trl.generation.local import LocalSampler
from trl.generation.sampler import SamplingParams
from trl.models.forward import introduce
from trl.models.scoring import score
from trl.rollout.experience import Experience

CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "here"}}\n</tool_call><|im_end|>'


def look(place: str) -> Any:
    """Look somewhere.

    Args:
        place: where to look
    """
    raise NotImplementedError


def tool(result: Callable[[], Any]) -> Callable[..., Any]:
    """`look` with this result."""

    def look(place: str) -> Any:
        return result()

    look.__doc__ = globals()["look"].__doc__
    return look


@dataclass
class Script:
    """A sampler that says what it is told, and remembers what it was asked."""

    tokenizer: Any
    turns: list[str]
    asked: list[list[int]] = field(default_factory=list)

    def sample(self, prompts: Any, params: Any, n: int = 1) -> list[list[Completion]]:
        self.asked += [list(prompt) for prompt in prompts]
        ids = self.tokenizer(self.turns.pop(0), add_special_tokens=False)["input_ids"][: params.max_new_tokens]
        return [[Completion(list(ids), [-1.0] * len(ids), [-1.0] * len(ids), "stop")] for _ in prompts]


def qwen() -> Any:
    tokenizer = read_by(processor_of("qwen2_5_vl"))
    tokenizer.chat_template = (  # as the family's, with tools and their calls
        tokenizer.chat_template.replace(
            "{% for message in messages %}",
            "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
            "{% endif %}{% for message in messages %}",
            1,
        ).replace(
            "{% if message['content'] is string %}",
            "{% if message.tool_calls %}{{ message['content'] or '' }}{% for call in message.tool_calls %}<tool_call>\n"
            '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
            "{% endfor %}<|im_end|>\n{% elif message['content'] is string %}",
        )
    )
    return tokenizer


def played(
    tokenizer: Any, result: Callable[[], Any], row: dict[str, Any] | None = None, limit: int = 400, **given: Any
) -> tuple[Any, Script]:
    script = Script(tokenizer, [CALL, "A cat.<|im_end|>"])
    environment = ChatEnvironment([tool(result)], tokenizer=tokenizer, **given)
    turns = SampledTurns(script, SamplingParams(max_new_tokens=200, stop_token_ids=(tokenizer.eos_token_id,)))
    row = {"prompt": [{"role": "user", "content": "What is there?"}]} if row is None else row
    return environment.rollout([row], turns, [0], limit), script


def as_file(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def part(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed)}


RESULTS: dict[str, tuple[Callable[[], Any], list[int], str]] = {
    "a picture": (lambda: picture(5), [5], "[picture]"),
    "its file": (lambda: as_file(5), [5], "[picture]"),
    "its data URL": (lambda: data_url(picture(5)), [5], "[picture]"),
    "a part": (lambda: {"type": "image_url", "image_url": {"url": data_url(picture(5))}}, [5], "[picture]"),
    "a base64 part": (
        lambda: {"type": "image", "data": base64.b64encode(as_file(5)).decode(), "mimeType": "image/png"},
        [5],
        "[picture]",
    ),
    "parts": (
        lambda: [{"type": "text", "text": "before"}, part(5), "between", picture(6)],
        [5, 6],
        "before\n[picture]\nbetween\n[picture]",
    ),
    "a dict": (
        lambda: {"name": "cat", "view": picture(5), "more": [picture(6)]},
        [5, 6],
        '{"name": "cat", "view": "[picture 1]", "more": ["[picture 2]"]}\n[picture]\n[picture]',
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_tool_answers_with_pictures(kind: str) -> None:
    """They stand among the tokens of the answer, which nobody learns, and reach the messages as PIL pictures."""
    tokenizer = qwen()
    reader = reader_of(tokenizer)
    assert reader is not None
    result, seeds, said = RESULTS[kind]
    rollout, script = played(tokenizer, result)
    (completion,), (mask,) = rollout.completions, rollout.masks
    numbers = reader.occurrences(completion)
    assert [Album.open(number).tobytes() for number in numbers] == [picture(seed).tobytes() for seed in seeds]
    assert [mask[at] for at, token in enumerate(completion) if token < 0] == [0] * (4 * len(seeds))
    assert sum(mask) == len(tokenizer(CALL + "A cat.<|im_end|>")["input_ids"])
    assert script.asked[1] == [*rollout.prompts[0], *completion[: len(script.asked[1]) - len(rollout.prompts[0])]]
    assert rollout.metadata["tools_failed"] == [0]
    (_, told, _) = rollout.metadata["completions"][0]
    shown = [one["image"] for one in told["content"] if one["type"] == "image"]
    assert [one.tobytes() for one in shown] == [picture(seed).tobytes() for seed in seeds]
    words = "\n".join(one.get("text", "[picture]") for one in told["content"])
    assert words == said
    assert rollout.texts[0].count("<|vision_start|><|image_pad|><|vision_end|>") == len(seeds)


def test_the_answer_is_what_the_template_renders_of_the_whole_conversation() -> None:
    tokenizer = qwen()
    reader = reader_of(tokenizer)
    assert reader is not None
    rollout, _ = played(tokenizer, lambda: ["Here:", picture(5)])
    numbers = reader.occurrences(rollout.completions[0])
    messages = [
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"place": "here"}}}
        ]},
        {"role": "tool", "content": [{"type": "text", "text": "Here:"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
    ]  # fmt: skip
    schemas = ChatEnvironment([look], tokenizer=tokenizer).schemas
    text = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False).removesuffix("\n")
    ids = reader.tokens(tokenizer(reader.expand(text, (), numbers).text)["input_ids"], numbers)
    assert [*rollout.prompts[0], *rollout.completions[0]] == ids


def test_a_template_that_prints_no_parts_of_tools_has_the_user_tell_them() -> None:
    tokenizer = qwen()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% elif message['content'] is string %}",
        "{% elif message.role == 'tool' %}{{ message['content'] | string }}<|im_end|>\n"
        "{% elif message['content'] is string %}",
    )
    reader = reader_of(tokenizer)
    assert reader is not None
    rollout, _ = played(tokenizer, lambda: ["Here:", picture(5)])
    assert len(reader.occurrences(rollout.completions[0])) == 1
    assert (
        "<|im_start|>user\n<tool_response>\nHere:<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>"
    ) in rollout.texts[0]
    words, _ = played(tokenizer, lambda: "Here")
    assert "<|im_start|>tool\nHere<|im_end|>" in words.texts[0]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda: b"\x89PNG\r\n\x1a\n broken", "Tool error: the tool's picture"),
        (lambda: {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, "Tool error: the tool's picture"),
    ],
)
def test_a_picture_that_cannot_be_read_is_an_error_that_the_model_reads(result: Any, said: str) -> None:
    rollout, _ = played(qwen(), result)
    assert rollout.metadata["tools_failed"] == [1]
    assert said in rollout.texts[0]
    assert min(rollout.completions[0]) >= 0


def test_a_model_that_reads_text_only_is_told_so() -> None:
    tokenizer = qwen()
    del tokenizer.__dict__["_reads_pictures"]
    rollout, _ = played(tokenizer, lambda: picture(5))
    assert "Tool error: the tool gave a picture, and only text can be read here" in rollout.texts[0]
    assert rollout.metadata["tools_failed"] == [1]


def test_a_tools_text_is_no_picture() -> None:
    """Words that stand for one are parted by a blank: no pass could read them."""
    tokenizer = qwen()
    reader = reader_of(tokenizer)
    assert reader is not None
    for result in ("see <|image_pad|>!", ["see <|image_pad|>!", picture(5)]):
        rollout, _ = played(tokenizer, lambda result=result: result)
        assert reader.image_token_id not in rollout.completions[0]
        assert "see < |image_pad|>!" in rollout.texts[0]


def test_an_answer_is_cut_in_its_text_and_never_in_a_picture() -> None:
    tokenizer = qwen()
    rollout, _ = played(tokenizer, lambda: ["abcdefghij", picture(5), "klm"], max_tool_response=8)
    told = rollout.metadata["completions"][0][1]["content"]
    assert [one.get("text", "picture") for one in told] == ["abcde...", "picture"]
    whole, _ = played(tokenizer, lambda: picture(5))
    start = next(at for at, token in enumerate(whole.completions[0]) if token < 0)
    answer = sum(whole.masks[0][:start])
    for limit in range(start - 3, start + 6):
        rollout, _ = played(tokenizer, lambda: picture(5), limit=limit)
        assert rollout.metadata["truncated"] == [True]
        assert len(rollout.completions[0]) == min(answer, limit)


@pytest.mark.parametrize("form", ["parts", "column", "reset"])
def test_prompts_with_pictures(form: str) -> None:
    """By parts, by a column, and by what `reset` says."""
    tokenizer = qwen()
    reader = reader_of(tokenizer)
    assert reader is not None
    text = {"type": "text", "text": "What is it?"}
    message = {"role": "user", "content": [part(5), text]}
    rows = {
        "parts": {"prompt": [message]},
        "column": {"prompt": [{"role": "user", "content": "What is it?"}], "images": [picture(5)]},
        "reset": {"prompt": []},
    }

    class World:
        def reset(self) -> Any:
            return [message]

        def wait(self) -> str:
            """Wait."""
            return "waited"

    factory = {"environment_factory": World} if form == "reset" else {}
    rollout, _ = played(tokenizer, lambda: "nothing", rows[form], **factory)
    (number,) = reader.occurrences(rollout.prompts[0])
    assert Album.open(number).tobytes() == picture(5).tobytes()
    assert "<|im_start|>user\n<|vision_start|>" in tokenizer.decode(reader.plain(rollout.prompts[0]))


def test_histories_with_pictures_are_shown() -> None:
    tokenizer = qwen()
    rollout, _ = played(tokenizer, lambda: picture(5))
    (history,) = rollout.metadata["histories"]
    assert isinstance(history, TextHistory)
    assert history.to_html(tokenizer).count("&lt;|image_pad|&gt;") == 1
    history.show_tokens(tokenizer)


def test_a_model_plays_with_pictures() -> None:
    """The local sampler goes on behind them; its log-probabilities are the model's own."""
    from test_sampling import own_logits

    tokenizer, model = qwen(), model_of("qwen2_5_vl")
    introduce(model, tokenizer)
    sampler = LocalSampler(model, tokenizer)
    calls = iter([tokenizer(CALL, add_special_tokens=False)["input_ids"]])

    @dataclass
    class First:
        """The call is given; the model says what follows."""

        def sample(self, prompts: Any, params: Any, n: int = 1) -> list[list[Completion]]:
            ids = next(calls, None)
            if ids is None:
                return sampler.sample(prompts, params, n)
            return [[Completion(list(ids), [-1.0] * len(ids), [-1.0] * len(ids), "stop")] for _ in prompts]

    environment = ChatEnvironment([tool(lambda: picture(5))], tokenizer=tokenizer, max_iterations=1)
    turns = SampledTurns(First(), SamplingParams(max_new_tokens=6, stop_token_ids=()))
    prompt = [{"role": "user", "content": [part(6), {"type": "text", "text": "Where?"}]}]
    rollout = environment.rollout([{"prompt": prompt}], turns, [0], 300)
    ids = [*rollout.prompts[0], *rollout.completions[0]]
    logprobs_TV = own_logits(model, ids)[-7:-1].log_softmax(-1)  # of the last turn, of 6 tokens
    expected = logprobs_TV.gather(1, torch.tensor(ids[-6:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(rollout.logprobs[0][-6:]), expected, atol=1e-5, rtol=0)
    assert rollout.masks[0][-6:] == [1] * 6


def test_what_is_learned_behind_a_tools_picture_is_scored_as_the_model_does() -> None:
    """A row whose prompt and answer hold pictures, beside one without: each token as in the model's own call."""
    from test_sampling import own_logits

    tokenizer, model = qwen(), model_of("qwen2_5_vl")
    introduce(model, tokenizer)
    asked = {"prompt": [{"role": "user", "content": [part(6), {"type": "text", "text": "Where?"}]}]}
    rollout, _ = played(tokenizer, lambda: ["Here:", picture(5)], asked)
    words, _ = played(tokenizer, lambda: "nothing")
    for name in ("prompts", "completions", "logprobs", "masks"):
        getattr(rollout, name).extend(getattr(words, name))
    with torch.no_grad():
        logprobs_BT = score(model, Experience.of(rollout).packed()).logprobs_BT
    for row, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        chosen = torch.tensor(rollout.masks[row], dtype=torch.bool)
        own_TV = own_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1].log_softmax(-1)[chosen]
        expected = own_TV.gather(1, torch.tensor(answer)[chosen][:, None])[:, 0]
        torch.testing.assert_close(logprobs_BT[row, : len(answer)][chosen], expected, atol=1e-5, rtol=0)
