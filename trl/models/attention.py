"""Attention over a token tree, as an implementation that transformers' models call.

A model prepared with `enable_tree_attention` takes `tree=TreeLayout` in its forward: each segment of the packed row
then sees its ancestors whole and itself causally. Without `tree` it computes what it computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl.kernels.tree_attention import TreeLayout, takes, tree_attention

PREFIX = "token_tree_"
_inside_tree: ContextVar[bool] = ContextVar("inside_tree", default=False)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of [1, H, Q, D] over [1, H or fewer, K, D]; by hand with a soft-cap or sinks, which SDPA lacks."""
    if softcap is None and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value.repeat_interleave(repeats, 1)


def segment_attention(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None, **how: Any
) -> Tensor:
    """Attention of the packed row [1, H, N, D], a segment at a time.

    Each tensor is split once, because a slice for each segment would cost a gradient of full size each.
    """
    queries = query.split([layout.sizes[index] for index in layout.own], dim=2)
    keys, values = (list(x.split(layout.sizes, dim=2)) for x in (key, value))
    outputs = []
    for own, index in zip(queries, layout.own, strict=True):
        chain = layout.seen_by(index, window)
        seen_keys = keys[index] if len(chain) == 1 else torch.cat([keys[link] for link in chain], 2)
        seen_values = values[index] if len(chain) == 1 else torch.cat([values[link] for link in chain], 2)
        mask = layout.mask(own.shape[2], seen_keys.shape[2], window, query.device)
        outputs.append(attend(own, seen_keys, seen_values, mask, causal=mask is None, **how))
    return torch.cat(outputs, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_tree_attention(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None, scale: float | None
) -> Tensor:
    """`segment_attention` on CUDA in one kernel: FlexAttention over the blocks of the tree's mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def make() -> Any:
        seen = layout.dense_mask(window).to(query.device)
        if layout.piece is not None:
            seen = seen[layout.piece.positions(query.device)]
        sizes = query.shape[2], key.shape[2]
        return create_block_mask(lambda b, h, q, k: seen[q, k], None, None, *sizes, device=query.device)

    return _compiled_flex()(
        query,
        key,
        value,
        block_mask=layout.cached(("flex", window, query.device), make),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _tree_or(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of a model whose own implementation is `original`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        tree: TreeLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if tree is None and original in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[original](
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        how: dict[str, Any] = {
            "scale": scaling,
            "dropout": dropout,
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
        }
        window = kwargs.get("sliding_window")
        if tree is not None and tree.piece is not None:
            key, value = tree.piece.gathered(key, value)
        plain = not dropout and how["softcap"] is None and how["sinks"] is None
        if tree is not None and plain and takes(query, key, value):
            return tree_attention(tree, module, query, key, value, window=window, scale=scaling), None
        if tree is None:  # an eager model: its own function is not registered, so the same by hand
            out = attend(query, key, value, attention_mask, causal=False, **how)
        elif query.is_cuda and plain:
            out = flex_tree_attention(tree, query, key, value, window=window, scale=scaling)
        else:
            out = segment_attention(tree, query, key, value, window=window, **how)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _mask_or(original: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if _inside_tree.get() else ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    return mask


def own_attention(model: Any) -> str:
    """The name of the attention implementation that the model has been given."""
    return (getattr(model.config, "_attn_implementation", None) or "eager").removeprefix(PREFIX)


def enable_tree_attention(model: Any) -> None:
    """Let a transformers model take `tree=`; it keeps its own attention for every other call."""
    original = model.config._attn_implementation or "eager"
    if original.startswith(PREFIX):
        return
    name = PREFIX + original
    AttentionInterface.register(name, _tree_or(original))
    AttentionMaskInterface.register(name, _mask_or(original))
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise NotImplementedError(f"the attention of {type(model).__name__} cannot be replaced")


@contextmanager
def inside_tree() -> Iterator[None]:
    """Within it models build no attention mask: the tree says who sees whom."""
    token = _inside_tree.set(True)
    try:
        yield
    finally:
        _inside_tree.reset(token)
