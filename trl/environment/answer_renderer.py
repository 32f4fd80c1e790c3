"""What a chat template puts behind an assistant's turn when tools answer: rendered alone, the turn is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trl.data.chat import ChatTemplate, Messages
from trl.data.encode import TextEncoder
from trl.environment.tool_text import call_id


class Answer(NamedTuple):
    """Of a tool."""

    name: str
    text: str


class AnswerRenderer:
    """Continues tokens that end with an assistant's turn: by the tools' answers and a new generation prompt.

    The template renders a stand-in conversation with and without the answers; what they add is tokenised by itself and
    appended. So nothing that the model has seen or said is rendered or tokenised again. That this is what the template
    would make of the whole conversation is checked once: a template for which it is not so is a ValueError.

    ends: the tokens that can end a turn.
    """

    def __init__(self, template: ChatTemplate, ends: Sequence[int], schemas: Sequence[Any] = ()) -> None:
        self.template, self.schemas = template, list(schemas)
        self.encoder = TextEncoder(template.tokenizer)
        self.end_id = self._end_of_turns(ends)
        self._end = str(template.tokenizer.decode([self.end_id]))
        self._refuse_rewriting()

    def __call__(self, answers: Sequence[Answer], closed: bool) -> tuple[str, list[int]]:
        """`(text, ids)` of what follows the turn; closed: the turn has its end token already."""
        text = self._suffix(_stand_in("x", [answer.name for answer in answers]), answers)
        text = text if closed else self._end + text
        return text, self.encoder.continuations([text])[0]

    def _suffix(self, spoken: Messages, answers: Sequence[Answer]) -> str:
        told = [
            {"role": "tool", "name": answer.name, "tool_call_id": call_id(place), "content": answer.text}
            for place, answer in enumerate(answers)
        ]
        before = self.template.render(spoken, self.schemas)
        after = self.template.render([*spoken, *told], self.schemas, open_turn=True)
        cut = before.rindex(self._end) + len(self._end)
        if not after.startswith(before[:cut]):
            raise ValueError(
                "the chat template renders an assistant's turn in another way once tools have answered, so the tokens "
                "that the model sampled would not be what it sees; use a template that leaves earlier turns as they are"
            )
        return after[cut:]

    def _end_of_turns(self, ends: Sequence[int]) -> int:
        text = self.template.render(_stand_in("x", ["tool"]), self.schemas)
        places = {end: text.rfind(str(self.template.tokenizer.decode([end]))) for end in ends}
        last = max(places, key=lambda end: places[end], default=None)
        if last is None or places[last] < text.index("tool"):
            names = ", ".join(str(self.template.tokenizer.decode([end])) for end in ends) or "none"
            raise ValueError(
                f"the chat template ends an assistant's turn with none of the model's end tokens ({names}); set "
                "`generation_config.eos_token_id` to the one that it uses"
            )
        return last

    def _refuse_rewriting(self) -> None:
        """Answers must look the same whatever was said before, in the first round and in a later one."""
        answers = [Answer("tool", "four"), Answer("tool", "five")]
        once = _stand_in("x", ["tool", "tool"])
        told: Messages = [
            {"role": "tool", "name": "tool", "tool_call_id": call_id(place), "content": "six"} for place in range(2)
        ]
        twice = [*_stand_in("Another question?", ["tool", "tool"]), *told, *once[1:]]
        if self._suffix(once, answers) != self._suffix(twice, answers):
            raise ValueError(
                "the chat template renders a tool's answer in another way in later rounds, so it cannot be appended to "
                "what the model has seen; use a template that renders every round alike"
            )


def _stand_in(question: str, names: Sequence[str]) -> Messages:
    calls = [
        {"type": "function", "id": call_id(place), "function": {"name": name, "arguments": {}}}
        for place, name in enumerate(names)
    ]
    thoughts = "<think>\nWhat is it?\n</think>\n\nI look it up."  # what some templates drop later on
    return [{"role": "user", "content": question}, {"role": "assistant", "content": thoughts, "tool_calls": calls}]
