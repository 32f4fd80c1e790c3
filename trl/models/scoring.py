"""Log-probabilities, values and scores of a batch: packed where the architecture allows it, padded elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from trl.data.packing import pack
from trl.data.records import Branch, PackedBatch, TokenTree
from trl.kernels.grad_in_place import lookup
from trl.kernels.last_layer import last_layer, only_at
from trl.kernels.norms import fused_norms
from trl.kernels.rotary import fused_rotary
from trl.kernels.swapped_forward import stand_in
from trl.models.attention import TreeLayout, enable_tree_attention, inside_tree
from trl.models.head import Head, head_of, logprobs_and_entropy, token_logprobs
from trl.models.unwrap import below_value_head, is_encoder_decoder

logger = logging.getLogger(__name__)

Path = Literal["packed", "padded"]
_paths: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
_narrow: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""models whose last layer may skip positions that nobody reads"""
WORTH_IT = 0.9
"""share of positions that are read above which the last layer computes all of them"""
PROBE_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Scores:
    """What a model says of the scored tokens; zeros where a position is not scored."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None = None
    values_BT: Tensor | None = None


@dataclass(frozen=True)
class Hidden:
    """The input of a model's head, at whichever positions are wanted."""

    states: Tensor
    """[1, N, D] packed, [B, L, D] padded"""
    path: Path
    packed: PackedBatch

    def at(self, index_S: Tensor, row_S: Tensor) -> Tensor:
        """States at packed positions, [S, D]; `row_S` says whose they are."""
        if self.path == "packed":
            return self.states[0].index_select(0, index_S)
        return self.states[row_S, self.packed.position_N[index_S]]

    def scored(self) -> Tensor:
        """The states that predict the scored tokens, [S, D]."""
        return self.at(self.packed.scored_S, self.packed.row_S)


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """What reaches `module` while the context lasts; it answers with one column, so nothing large is computed."""
    seen: list[Tensor] = []

    def first_column(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    with stand_in(module, first_column):
        yield seen


def padded_inputs(packed: PackedBatch, pad_token_id: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` of the rows, each whole and padded on the right. [B, L]"""
    rows = [torch.tensor(packed.row_indices(row), device=packed.ids_N.device) for row in range(packed.rows)]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.where(mask.bool(), packed.ids_N[index], pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": packed.position_N[index] * mask}


def encoder_decoder_inputs(packed: PackedBatch, start_token_id: int, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Prompts for the encoder and branches, shifted right, for the decoder; both padded on the right."""
    device = packed.ids_N.device
    prompts, branches = [], []
    for row, prompt_tokens in enumerate(packed.prompt_tokens):
        index = torch.tensor(packed.row_indices(row), device=device)
        ids = packed.ids_N[index]
        prompts.append(ids[:prompt_tokens])
        branches.append(torch.cat([ids.new_tensor([start_token_id]), ids[prompt_tokens:-1]]))
    columns = {}
    for name, rows in (("", prompts), ("decoder_", branches)):
        columns[f"{name}input_ids"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        ones = [torch.ones_like(row) for row in rows]
        columns[f"{name}attention_mask"] = nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return columns


def _run(model: nn.Module, module: nn.Module, packed: PackedBatch, path: Path, index_S: Tensor) -> Tensor:
    """The states that reach the head `module` when the batch is run along `path`; right at `index_S` only."""
    with _captured(module) as seen:
        if path == "packed":
            _run_packed(model, packed, index_S.unique())
        else:
            model(**padded_inputs_of(model, packed))
    return seen[-1]


def _run_packed(model: nn.Module, packed: PackedBatch, positions: Tensor) -> None:
    network, total = below_value_head(model), len(packed.ids_N)
    layer = last_layer(network) if _narrow.get(network) and len(positions) <= WORTH_IT * total else None
    layout = TreeLayout(packed.segments)
    if layer is not None and layer.attention is not None:
        layout.read_only_at(layer.attention, positions.tolist())
    few = () if layer is None else layer.by_position
    with (
        inside_tree(),
        fused_norms(network),
        fused_rotary(network),
        only_at(few, positions, total),
        lookup(network.get_input_embeddings()),
    ):
        model(input_ids=packed.ids_N[None], position_ids=packed.position_N[None], tree=layout, use_cache=False)


def padded_inputs_of(model: nn.Module, packed: PackedBatch) -> dict[str, Any]:
    """The rows padded, as keywords that this model takes. [B, L]"""
    inputs = padded_inputs(packed, _pad_token(model))
    if _is_encoder(model) or not takes_positions(model):  # encoders count positions in ways of their own
        inputs.pop("position_ids")
    return inputs if _is_encoder(model) else {**inputs, "use_cache": False}


def _pad_token(model: nn.Module) -> int:
    pad = getattr(below_value_head(model).config, "pad_token_id", None)
    return 0 if pad is None else pad


def _is_encoder(model: nn.Module) -> bool:
    return not hasattr(below_value_head(model), "prepare_inputs_for_generation") and not hasattr(
        below_value_head(model), "score"
    )


def takes_positions(model: nn.Module) -> bool:
    import inspect

    network = below_value_head(model)
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    return "position_ids" in inspect.signature(network.forward).parameters


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradient; the training flags of all modules come back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def path_of(model: nn.Module, module: nn.Module) -> Path:
    """Whether packed rows give what separate rows give: a probe of ten tokens, once per model, said if they do not."""
    network = below_value_head(model)
    if network not in _paths:
        _paths[network] = "packed" if _packs(network, module) else "padded"
        if _paths[network] == "padded":
            logger.warning(
                "%s does not compute packed rows as it computes separate ones: it takes the padded path (same results, "
                "slower).",
                type(network).__name__,
            )
    return _paths[network]


def _packs(network: Any, module: nn.Module) -> bool:
    vocabulary = network.config.get_text_config().vocab_size
    ids = [(7 * i + 3) % vocabulary for i in range(10)]
    tree = TokenTree(ids[:4], [Branch(ids[4:7]), Branch(ids[7:])])
    device = next(network.parameters()).device
    packed = pack([TokenTree(ids[5:7], [Branch(ids[1:3])]), tree]).to(device)
    with quietly(network):
        try:
            alone = Hidden(_run(network, module, packed, "padded", packed.scored_S), "padded", packed).scored()
            enable_tree_attention(network)
        except PROBE_ERRORS as error:
            logger.debug("probe of %s failed: %s", type(network).__name__, error)
            return False
        tolerance = TOLERANCE[alone.dtype] * float(alone.abs().max())
        for _narrow[network] in (True, False):
            try:
                states = _run(network, module, packed, "packed", packed.scored_S)
            except PROBE_ERRORS as error:
                logger.debug("probe of %s failed: %s", type(network).__name__, error)
                continue
            if torch.allclose(Hidden(states, "packed", packed).scored(), alone, rtol=0, atol=tolerance):
                return True
    return False


def hidden_states(
    model: nn.Module, packed: PackedBatch, module: nn.Module, path: Path | None = None, index_S: Tensor | None = None
) -> Hidden:
    """The states that reach the head `module`; `path` None: packed wherever the model can.

    index_S: packed positions at which they will be read (default: what is scored); elsewhere they may be wrong.
    """
    path = path or path_of(model, module)
    return Hidden(_run(model, module, packed, path, packed.scored_S if index_S is None else index_S), path, packed)


def scored_states(model: nn.Module, packed: PackedBatch, path: Path | None = None) -> tuple[Head, Tensor]:
    """The language-model head and the states that predict the scored tokens. Head, [S, D]"""
    network = below_value_head(model)
    head = head_of(network)
    if not is_encoder_decoder(model):
        return head, hidden_states(model, packed, head.module, path).scored()
    start = network.config.decoder_start_token_id
    with _captured(head.module) as seen:
        model(**encoder_decoder_inputs(packed, start, _pad_token(model)), use_cache=False)
    return head, seen[-1][packed.row_S, packed.slot_S]


def score(
    model: nn.Module,
    packed: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    values: bool = False,
    path: Path | None = None,
) -> Scores:
    """Log-probabilities of the scored tokens, and on demand entropies and the value head's values. [B, T] each

    A token's value is the one at the position that predicts it. `entropy_gradient` makes the entropies
    differentiable, at the price of a second pass through the head. `path` "padded" forces the padded computation.
    """
    head, states_SD = scored_states(model, packed, path)
    if entropy_gradient:
        logprobs_S, entropy_S = logprobs_and_entropy(head, states_SD, packed.target_S, temperature)
    else:
        logprobs_S, entropy_S = token_logprobs(
            head, states_SD, packed.target_S, temperature=temperature, entropy=entropy
        )
    values_BT = None
    if values:
        v_head = extract_model_from_parallel(model).v_head
        values_BT = packed.spread(v_head(states_SD[None]).float().squeeze(0).squeeze(-1))
    wanted = entropy or entropy_gradient
    return Scores(packed.spread(logprobs_S), packed.spread(entropy_S) if wanted else None, values_BT)


def logits_and_labels(model: nn.Module, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Whole logits of the padded rows, for metrics that need them, and labels (-100 where nothing is scored).

    [B, L, V] and [B, L], a label at its own token; [B, T, V] and [B, T] of an encoder-decoder's answers.
    """
    if is_encoder_decoder(model):
        start = below_value_head(model).config.decoder_start_token_id
        logits = model(**encoder_decoder_inputs(packed, start, _pad_token(model)), use_cache=False).logits
        place = packed.slot_S
    else:
        logits = model(**padded_inputs_of(model, packed)).logits
        place = packed.position_N[packed.scored_S] + 1
    labels = torch.full(logits.shape[:2], -100, device=logits.device)
    labels[packed.row_S, place] = packed.target_S
    return logits, labels


def classifier_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into scores, in models for sequence or token classification."""
    network = below_value_head(model)
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    for name in ("score", "classifier", "classification_head"):
        if isinstance(getattr(network, name, None), nn.Module):
            return getattr(network, name)
    raise ValueError(f"{type(network).__name__} has no score head: load it with AutoModelForSequenceClassification")


def scores_at(
    model: nn.Module, packed: PackedBatch, index_S: Tensor, row_S: Tensor, path: Path | None = None
) -> Tensor:
    """The score head's outputs at packed positions, for causal models (value models, process rewards). [S, labels]"""
    module = classifier_of(model)
    return module(hidden_states(model, packed, module, path, index_S).at(index_S, row_S)).float()


def rewards(model: nn.Module, packed: PackedBatch, path: Path | None = None) -> Tensor:
    """The reward of each row, read at its last real token; encoders read it where they always do. [B]"""
    network = below_value_head(model)
    if network.config.num_labels != 1:
        raise ValueError(f"num_labels={network.config.num_labels}: a reward model has 1")
    if _is_encoder(model) or is_encoder_decoder(model):
        inputs = padded_inputs(packed, _pad_token(model))
        inputs.pop("position_ids")
        return model(**inputs).logits[:, 0].float()
    rows = torch.arange(packed.rows, device=packed.ids_N.device)
    return scores_at(model, packed, packed.last_B, rows, path)[:, 0]
