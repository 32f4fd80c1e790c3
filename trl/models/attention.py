"""Attention over a token tree, as an implementation that transformers' models call.

A model prepared with `enable_tree_attention` takes `tree=TreeLayout` in its forward: each segment of the packed row
then sees its ancestors whole and itself causally. Without `tree` it computes what it computed before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl.data.records import Segment, moved_ahead
from trl.kernels.block_mask import (
    BLOCK,
    BlockTables,
    Kind,
    block_tables,
    flash_rows,
    flash_takes,
    flex_tree_attention,
    kind_of,
    on_device,
    row_bounds,
)
from trl.kernels.tree_attention import TreeLayout, compiled_tree_attention, takes, tree_attention

logger = logging.getLogger(__name__)

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


SMALL = 512
"""tokens up to which a pass without gradient, a probe say, is not worth compiling a kernel for"""


def device_attention(
    tree: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *,
    window: int | None, scale: float | None, dropout: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`segment_attention` on an accelerator, in one kernel where there is one."""
    where = query.device
    if torch.is_autocast_enabled(where.type):  # rotary embeddings may have widened two of the three
        narrow = torch.get_autocast_dtype(where.type)
        query, key, value = (x.to(narrow) for x in (query, key, value))
    how: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "sinks": sinks}
    if dropout:
        _say_dropout(dropout)
    elif where.type == "cuda" and (torch.is_grad_enabled() or query.shape[2] > SMALL):
        with torch.autocast(where.type, enabled=False):
            kind = kind_of(query, key, value, **how)
            if tree.is_flat and flash_takes(kind) and _agrees(FLASH, kind, where):
                return _by_flash(tree, query, key, value, **how)
            if (tree.piece is None or tree.piece.run % BLOCK == 0) and _agrees(FLEX, kind, where):
                return _by_flex(tree, query, key, value, **how)
    return segment_attention(tree, query, key, value, dropout=dropout, **how)


def _in_graph(tree: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any) -> Tensor:
    """`device_attention` as part of a graph that torch compiles, by FlexAttention."""
    where = query.device.type
    if torch.is_autocast_enabled(where):
        narrow = torch.get_autocast_dtype(where)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if how["scale"] is not None:  # a graph for every number may not hand it to the kernel
        query = query * (how.pop("scale") * query.shape[-1] ** 0.5)
    return flex_tree_attention(
        query, key, value, tree.blocks[window], window=window, compiled=False, **{**how, "scale": None}
    )


def lay_out_for_graphs(tree: TreeLayout, network: Any) -> None:
    """Put what `_in_graph` reads beside a layout, for each window of the network."""
    device, config = next(network.parameters()).device, network.config.get_text_config()
    for window in {None, getattr(config, "sliding_window", None)}:
        tree.blocks[window] = _tables(tree, window, device)


def _tables(tree: TreeLayout, window: int | None, device: torch.device) -> BlockTables:
    def make() -> BlockTables:
        blocks = None if tree.piece is None else (tree.piece.positions("cpu")[::BLOCK] // BLOCK).tolist()
        return on_device(block_tables(tree.segments, window, blocks), device)

    return tree.shared(("blocks", window, device), make)


def _by_flash(
    tree: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None, **_: None
) -> Tensor:
    bounds = tree.shared(("rows", query.device), lambda: row_bounds(tree.segments, query.device))
    return flash_rows(query, key, value, bounds, window=window, scale=scale)


def _by_flex(tree: TreeLayout, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any) -> Tensor:
    places = None
    if (piece := tree.piece) is not None:
        key_of = ("places", query.device)
        places = tree.shared(key_of, lambda: moved_ahead(piece.positions("cpu").int(), query.device))
    tables = _tables(tree, window, query.device)
    return flex_tree_attention(query, key, value, tables, window=window, places_Q=places, **how)


HALF = (torch.float16, torch.bfloat16)
FLASH, FLEX = "flash attention", "FlexAttention"
KERNELS: dict[str, Callable[..., Tensor]] = {FLASH: _by_flash, FLEX: _by_flex}
ROUNDING = {torch.float32: 5e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""how far from exact a kernel may be by its rounding alone, as a share of the largest number"""


@cache
def _agrees(name: str, kind: Kind, device: torch.device) -> bool:
    """Whether a kernel computes attention of this kind as it is computed segment by segment, gradients included.

    It is tried once, on a few tokens; what it is compiled for then serves every length.
    """
    try:
        far = [
            (share_off(one, exact), share_off(plain, exact))
            for one, plain, exact in tried(KERNELS[name], kind, device, shared=name == FLEX)
        ]
        worst, of_plain = max(far, key=lambda pair: pair[0] - 3 * pair[1])
        if worst <= 3 * of_plain + ROUNDING.get(kind.dtype, 1e-3):
            return True
        found = f"off by {worst:.1g} of the largest number"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, of any type
        found = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    logger.warning(
        "%s does not compute attention of %d heads with %d numbers in %s here (%s): %s (same results, slower).",
        name, kind.heads[0], kind.widths[0], str(kind.dtype).removeprefix("torch."), found,
        "it is computed segment by segment" if name == FLEX else f"{FLEX} does",
    )  # fmt: skip
    return False


def share_off(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the other's largest number."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


@torch.inference_mode(False)
def tried(
    kernel: Callable[..., Tensor], kind: Kind, device: torch.device, *, shared: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients by a kernel, segment by segment, and so in more digits, of attention on a few tokens.

    shared: the last two segments see the first.
    """
    parent = 0 if shared else -1
    tree = TreeLayout([Segment(0, 150, -1), Segment(150, 300, parent), Segment(300, 500, parent)])
    (heads, of_keys), (width, of_values), results = kind.heads, kind.widths, []
    shapes = [(1, 500, heads, width), (1, 500, of_keys, width), (1, 500, of_keys, of_values)]
    digits = torch.float32 if kind.dtype in HALF else torch.float64
    for function, dtype in ((kernel, kind.dtype), (segment_attention, kind.dtype), (segment_attention, digits)):
        leaves = [_scattered(shape, phase, kind.dtype, device).to(dtype) for phase, shape in enumerate(shapes)]
        for leaf in leaves:
            leaf.requires_grad_(kind.learns)
        sinks = _scattered((heads,), 3, kind.dtype, device).to(dtype) if kind.sinks else None
        # the hooks: of a checkpoint around, which must not see what is kept here
        with torch.set_grad_enabled(kind.learns), saved_tensors_hooks(_same, _same):
            out = function(
                tree, *(leaf.transpose(1, 2) for leaf in leaves), window=70 if kind.windowed else None,
                scale=kind.scale, softcap=kind.softcap, sinks=sinks,
            )  # fmt: skip
            weight = _scattered(tuple(out.shape), 4, kind.dtype, device).to(dtype)
            results.append([out, *(torch.autograd.grad(out, leaves, weight) if kind.learns else ())])
    return list(zip(*results, strict=True))


def _same(x: Tensor) -> Tensor:
    return x


def _scattered(shape: tuple[int, ...], phase: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers between -1 and 1 that look like drawn ones, without a draw from anybody's generator."""
    places = torch.arange(torch.Size(shape).numel(), device=device) % 99991  # which float32 counts exactly
    return ((places * 12.9898 + phase).sin() * 43758.5453).frac().view(shape).to(dtype)


@cache
def _say_dropout(rate: float) -> None:
    logger.warning(
        "attention_dropout=%g: no kernel drops attention weights of packed rows, so attention is computed segment by "
        "segment (slower).",
        rate,
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
            if torch.compiler.is_compiling() or (tree.table is not None and tree.piece is None):
                return compiled_tree_attention(tree, query, key, value, window=window, scale=scaling), None
            return tree_attention(tree, module, query, key, value, window=window, scale=scaling), None
        if tree is None:  # an eager model: its own function is not registered, so the same by hand
            out = attend(query, key, value, attention_mask, causal=False, **how)
        elif tree.blocks and torch.compiler.is_compiling() and not dropout:
            how.pop("dropout")
            out = _in_graph(tree, query, key, value, window=window, **how)
        elif query.device.type != "cpu":
            out = device_attention(tree, query, key, value, window=window, **how)
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


FINDS_ROWS = "find_packed_sequence_indices"
"""transformers' function that looks for rows in positions before it asks for a mask, and reads a number to say so"""


def _finds_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def find_packed_sequence_indices(*args: Any, **kwargs: Any) -> Any:
        return None if _inside_tree.get() else original(*args, **kwargs)

    find_packed_sequence_indices.of_trl = True  # type: ignore[attr-defined]
    return find_packed_sequence_indices


@contextmanager
def inside_tree() -> Iterator[None]:
    """Within it models build no attention mask: the tree says who sees whom."""
    token = _inside_tree.set(True)
    finds: Any = getattr(masking_utils, FINDS_ROWS, None)
    if replaced := finds is not None and not hasattr(finds, "of_trl"):
        setattr(masking_utils, FINDS_ROWS, _finds_no_rows(finds))
    try:
        yield
    finally:
        _inside_tree.reset(token)
        if replaced:
            setattr(masking_utils, FINDS_ROWS, finds)


@contextmanager
def outside_tree() -> Iterator[None]:
    """Within it models build their masks as they do alone: a vision tower amid a pass over a packed row."""
    token = _inside_tree.set(False)
    try:
        yield
    finally:
        _inside_tree.reset(token)
