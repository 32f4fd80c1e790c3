import sys
from html.parser import HTMLParser

import pytest
import torch

from trl.environment import TextHistory

PROMPT, CALL, ANSWER = torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6])


@pytest.fixture
def history() -> TextHistory:
    history = TextHistory("What? ", PROMPT)
    history.append_segment("<b>me</b>", CALL, system=False)
    history.append_segment("42", ANSWER)
    return history


def test_a_history_starts_with_the_system_by_default():
    history = TextHistory("Hi", PROMPT)
    assert (history.text, history.system_spans) == ("Hi", [True])
    assert (history.completed, history.truncated, history.reward) == (False, False, 0.0)
    assert history.token_masks.tolist() == [0, 0, 0]
    assert TextHistory("Hi", PROMPT, system=False).token_masks.tolist() == [1, 1, 1]


def test_segments(history):
    assert history.text == "What? <b>me</b>42"
    assert history.text_spans == [(0, 6), (6, 15), (15, 17)]
    assert history.system_spans == [True, False, True]
    assert history.token_spans == [(0, 3), (3, 5), (5, 6)]
    assert history.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert history.token_masks.tolist() == [0, 0, 0, 1, 1, 0]
    assert history.last_text_segment == "42"


def test_split(history):
    query, response, mask = history.split_query_response_tokens()
    assert (query.tolist(), response.tolist(), mask.tolist()) == ([1, 2, 3], [4, 5, 6], [1, 1, 0])


@pytest.mark.parametrize(("text", "tokens"), [("", CALL), ("text", CALL[:0])])
def test_nothing_empty_is_appended(history, text, tokens):
    with pytest.raises(ValueError, match="Can't append empty text or token list to history"):
        history.append_segment(text, tokens)
    assert len(history.text_spans) == 3


def test_logprobs_are_known_where_they_were_given(history):
    history.append_segment("!", torch.tensor([7, 8]), system=False, logprobs=torch.tensor([-1.0, -2.0]))
    assert history.token_logprobs.isnan().tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert history.token_logprobs[5:].tolist() == [0, -1, -2]


def test_complete(history):
    history.complete()
    assert (history.completed, history.truncated) == (True, False)
    history.complete(truncated=True)
    assert history.truncated


def test_show_text(history, capsys):
    history.reward = 0.5
    history.show_text(show_legend=True)
    shown = capsys.readouterr().out
    assert "What? <b>me</b>42\n\nReward: 0.5" in shown
    assert "(Colour Legend: Prompt|System|Model|Reward)" in shown


def test_show_text_of_a_single_segment(capsys):
    TextHistory("alone", PROMPT).show_text()
    assert "alone" in capsys.readouterr().out


def test_show_tokens(tiny_tokenizer, capsys):
    tokens = tiny_tokenizer("the sky is blue", return_tensors="pt").input_ids[0]
    history = TextHistory("the sky", tokens[:2])
    history.append_segment("is blue", tokens[2:], system=False)
    history.show_tokens(tiny_tokenizer)
    assert "the sky is blue \n\nReward: 0.0" in capsys.readouterr().out


def test_colours_stand_where_the_speaker_changes(history, monkeypatch):
    printed = []
    monkeypatch.setattr("rich.console.Console.print", lambda console, text: printed.append(text))
    history.show_text()
    spans = [(span.start, span.end, span.style) for span in printed[0].spans]
    assert spans == [
        (0, 6, "black on grey85"), (6, 15, "black on deep_sky_blue1"), (15, 17, "black on cyan3"),
        (17, 30, "black on plum1"),
    ]  # fmt: skip


@pytest.mark.parametrize(("show", "what"), [("text", "text"), ("tokens", "tokens"), ("colour_legend", "colour legend")])
def test_without_rich(history, tiny_tokenizer, monkeypatch, show, what):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.warns(UserWarning, match=f"install rich to display {what}"):
        getattr(history, f"show_{show}")(*([tiny_tokenizer] if show == "tokens" else []))


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_holds_the_text_escaped(history):
    reader = Reader(history._repr_html_())
    assert reader.open == []
    assert reader.text.startswith("What? <b>me</b>42Reward: 0.0")


def test_html_of_tokens(tiny_tokenizer):
    tokens = tiny_tokenizer("the sky", return_tensors="pt").input_ids[0]
    page = TextHistory("the sky", tokens).to_html(tiny_tokenizer)
    assert page.count("border-right") == 2
    assert Reader(page).text.startswith("thesky")
