"""Whether the local engine computes what a model computes: one probe of the rows that `models.forward` probes too."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl.data.records import PackedBatch
from trl.generation.engine import Engine
from trl.generation.kv_attention import cached_attention
from trl.generation.kv_cache import Prompt
from trl.models.forward import TOLERANCES, eval_no_grad, note, plan_of, probe_rows
from trl.models.scoring import plain_forward
from trl.models.unwrap import accepts, below_peft, below_value_head, is_encoder_decoder, learns_prompt, reads_rows


class NotLocal(ValueError):
    """The local engine would not compute what this model computes."""


def refuse_unsuitable(model: Any) -> None:
    """Raise NotLocal, with the reason, unless the local engine's logits are those of a plain forward."""
    network = below_value_head(model)
    plan = plan_of(network)
    if plan.samples_locally is None:
        reason = why_not_local(network)
        plan = note(network, replace(plan, samples_locally=reason is None, why_not_local=reason or ""))
    if not plan.samples_locally:
        raise NotLocal(f"{type(below_peft(network)).__name__} cannot use the local sampler: {plan.why_not_local}")


def why_not_local(model: Any) -> str | None:
    """The reason that a causal language model cannot use the local engine; None: its logits are a plain forward's."""
    base = below_peft(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return f"{type(base).__name__} is not a transformers model"
    if is_encoder_decoder(model):
        return "it is an encoder-decoder"
    if learns_prompt(model):
        return "its adapter puts virtual tokens before the prompt"
    if reads_rows(model):
        return "its adapter looks for its place in each row"
    if not accepts(model, "position_ids"):
        return "its forward takes no position_ids"
    try:
        return _compare(model, config.get_text_config(decoder=True))
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"its forward does not work with packed prompts ({type(error).__name__}: {str(error).splitlines()[0]})"


def _compare(model: Any, config: Any) -> str | None:
    packed, _ = probe_rows(model)
    engine = Engine(model, packed.ids_N.device)
    with eval_no_grad(model), cached_attention(model):
        ours_SV = _by_engine(engine, packed)
    strange = _strange_layers(config, engine.layers)
    if strange is not None:
        return strange
    with eval_no_grad(model):
        plain_SV, precision = plain_forward(model, packed, lambda head, states_SD: head.logits(states_SD))
    difference = float((ours_SV.float() - plain_SV).abs().max() / plain_SV.std())
    if not difference <= TOLERANCES[precision].logits:
        return f"its logits differ from a plain forward's by {difference:.1e} standard deviations"
    return None


def _by_engine(engine: Engine, packed: PackedBatch) -> Tensor:
    """The logits that predict the tokens of each branch: each prompt is read once, then a step adds a token. [S, V]"""
    rows = [packed.ids_N[packed.row_indices(row)].tolist() for row in range(packed.rows)]
    lengths = packed.prompt_tokens
    texts = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    prompts = {text: Prompt(list(text)) for text in texts}
    engine.prefill(list(prompts.values()))
    steps = [torch.stack([prompts[text].logits_V for text in texts])]  # type: ignore[misc]
    for text in texts:
        engine.start(prompts[text])
    branches = [row[length:] for row, length in zip(rows, lengths, strict=True)]
    for step in range(packed.width - 1):
        steps.append(engine.decode([branch[step] if step < len(branch) else 0 for branch in branches]))
    return torch.stack(steps, 1)[packed.row_S, packed.slot_S]


def _strange_layers(config: Any, windows: dict[int, int | None]) -> str | None:
    """What a few tokens would not show: layers whose attention went elsewhere, or whose window was not passed on."""
    kinds = getattr(config, "layer_types", None)
    others = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if others:
        return f"it has layers of the kind {', '.join(others)}"
    if len(windows) != config.num_hidden_layers:
        return f"the attention of {config.num_hidden_layers - len(windows)} layers cannot be replaced"
    passed = sum(window is not None for window in windows.values())
    asked = list(kinds or ()).count("sliding_attention")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if passed < asked or (not kinds and window and not passed) or getattr(config, "attention_chunk_size", None):
        return "it does not tell its attention how far back it looks"
    return None
