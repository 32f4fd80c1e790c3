"""The text of an episode and its tokens, segment by segment."""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from trl import import_utils
from trl.data.any_text import console, encodable, visible
from trl.data.pictures import plain_ids

_HTML_COLOURS = {"Prompt": "#d9d9d9", "System": "#00d7af", "Model": "#5fd7ff", "Reward": "#ffafff"}


class TextHistory:
    """A text whose segments come from the system (prompt, tools) or from the model, with its tokens.

    Tokens are only appended: earlier segments are never tokenised again.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True) -> None:
        self.text = ""
        self.text_spans: list[tuple[int, int]] = []
        self.system_spans: list[bool] = []
        self.tokens: Tensor = tokens[:0]
        """[N] ids of the whole episode"""
        self.token_spans: list[tuple[int, int]] = []
        self.token_masks: Tensor = LongTensor([]).to(tokens.device)
        """[N] 1 = the model sampled this token"""
        self.token_logprobs: Tensor = torch.zeros(0, device=tokens.device)
        """[N] log-probability of each token when it was sampled: 0 where it was not sampled, nan where it is unknown"""
        self.episode: Any = None
        """the `Episode` of an environment that this is the text of, if any"""
        self.completed = False
        self.truncated = False
        self.reward: float | Tensor = 0.0
        self.prompt_color = "black on grey85"
        self.system_color = "black on cyan3"
        self.model_color = "black on deep_sky_blue1"
        self.reward_color = "black on plum1"
        self.extend(text, tokens, system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True, logprobs: Tensor | None = None) -> None:
        """Add a segment of the system or the model; neither text nor tokens may be empty."""
        if len(text) == 0 or len(tokens) == 0:
            raise ValueError("Can't append empty text or token list to history.")
        self.extend(text, tokens, system, logprobs)

    def extend(self, text: str, tokens: Tensor, system: bool, logprobs: Tensor | None = None) -> None:
        """As `append_segment`, but takes tokens that decode to no text."""
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens])
        self.token_masks = torch.cat([self.token_masks, torch.full_like(tokens, 0 if system else 1)])
        if logprobs is None:
            logprobs = torch.full(tokens.shape, 0.0 if system else torch.nan, device=tokens.device)
        self.token_logprobs = torch.cat([self.token_logprobs, logprobs.to(self.token_logprobs)])

    def complete(self, truncated: bool = False) -> None:
        """Mark the episode as over; `truncated`: it ended because it got too long."""
        self.completed = True
        self.truncated = truncated

    @property
    def last_text_segment(self) -> str:
        start, end = self.text_spans[-1]
        return self.text[start:end]

    @property
    def turns(self) -> list[str]:
        """What the model wrote, turn by turn."""
        spans = zip(self.text_spans[1:], self.system_spans[1:], strict=True)
        return [self.text[start:end] for (start, end), system in spans if not system]

    @property
    def own_environment(self) -> Any:
        """The object of an `environment_factory` that this episode used, if any."""
        own = getattr(self.episode, "own", None)
        return None if own is None else own.instance

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(query, response, response mask)`: the tokens of the first segment, all others, and 1 for the model's."""
        split = self.token_spans[0][1]
        return self.tokens[:split], self.tokens[split:], self.token_masks[split:]

    # --- display --------------------------------------------------------------------------------------------------

    def _roles(self) -> list[str]:
        return ["Prompt", *("System" if system else "Model" for system in self.system_spans[1:])]

    def _style(self, role: str) -> str:
        return str(getattr(self, f"{role.lower()}_color"))

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text, with the colour of its speaker (needs rich)."""
        pieces = [
            (self.text[start:end], role) for (start, end), role in zip(self.text_spans, self._roles(), strict=True)
        ]
        self._print(pieces, "text", show_legend)

    def show_tokens(self, tokenizer: PreTrainedTokenizerBase, show_legend: bool = False) -> None:
        """Print the tokens, with the colours of their speakers (needs rich)."""
        pieces = []
        for (start, end), role in zip(self.token_spans, self._roles(), strict=True):
            names = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, self.tokens[start:end].tolist()))
            pieces += [piece for name in names for piece in ((name, role), (" ", ""))]
        self._print(pieces, "tokens", show_legend)

    def show_colour_legend(self) -> None:
        """Print the colour of each speaker (needs rich)."""
        pieces: list[tuple[str, str]] = [("\n\n(Colour Legend: ", "")]
        for role in _HTML_COLOURS:
            pieces += [(role, role), ("|", "")]
        self._print([*pieces[:-1], (")", "")], "colour legend", show_legend=False, show_reward=False)

    def _print(self, pieces: Sequence[tuple[str, str]], what: str, show_legend: bool, show_reward: bool = True) -> None:
        if not import_utils.is_rich_available():
            warnings.warn(f"install rich to display {what}")
            return
        from rich.text import Text

        text = Text()
        for piece, role in pieces:
            text.append(visible(piece), style=self._style(role) if role else "")
        if show_reward:
            text.append(f"\n\nReward: {self.reward}", style=self.reward_color)
        console().print(text)
        if show_legend:
            self.show_colour_legend()

    def to_html(self, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The episode as HTML with a legend; with a `tokenizer`, each token has a frame."""

        def coloured(text: str, role: str, frame: str = "") -> str:
            shown = html.escape(encodable(text))
            return f'<span style="background:{_HTML_COLOURS[role]};color:#000;{frame}">{shown}</span>'

        parts = []
        edge = "border-right:1px solid #fff8;"
        spans = zip(self.text_spans, self.token_spans, self._roles(), strict=True)
        for (start, end), (first, last), role in spans:
            if tokenizer is None:
                parts.append(coloured(self.text[start:end], role))
            else:
                tokens = plain_ids(tokenizer, self.tokens[first:last].tolist())
                parts += [coloured(str(tokenizer.decode([token])), role, edge) for token in tokens]
        legend = " ".join(coloured(f" {role} ", role) for role in _HTML_COLOURS)
        reward = coloured(f"Reward: {self.reward}", "Reward")
        return (
            f'<div style="font-family:monospace"><div style="white-space:pre-wrap">{"".join(parts)}</div>'
            f"<p>{reward}</p><small>{legend}</small></div>"
        )

    def _repr_html_(self) -> str:
        return self.to_html()
