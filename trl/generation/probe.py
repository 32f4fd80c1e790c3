"""Whether the local engine computes what a model computes: asked once, with a few tokens."""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from trl.generation import kv_attention
from trl.generation.engine import Engine
from trl.generation.kv_cache import Prompt
from trl.generation.sampling_mode import accepts, learns_prompt, sampling_mode
from trl.models.unwrap import below_peft, below_value_head

_PROMPTS = (5, 3)
_ADDED = 2
_reasons: WeakKeyDictionary[torch.nn.Module, str | None] = WeakKeyDictionary()


class NotLocal(ValueError):
    """The local engine would not compute what this model computes."""


def refuse_unsuitable(model: Any) -> None:
    """Raise NotLocal, with the reason, unless the local engine's logits are those of a plain forward."""
    network = below_value_head(model)
    if network not in _reasons:
        _reasons[network] = why_not_local(network)
    if _reasons[network] is not None:
        raise NotLocal(f"{type(below_peft(network)).__name__} cannot use the local sampler: {_reasons[network]}")


def why_not_local(model: Any) -> str | None:
    """The reason that a causal language model cannot use the local engine; None: its logits are a plain forward's."""
    base = below_peft(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return f"{type(base).__name__} is not a transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if learns_prompt(model):
        return "its adapter puts virtual tokens before the prompt"
    if not accepts(model, "position_ids"):
        return "its forward takes no position_ids"
    try:
        return _compare(model, config.get_text_config(decoder=True))
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"its forward does not work with packed prompts ({type(error).__name__}: {str(error).splitlines()[0]})"


def _compare(model: Any, config: Any) -> str | None:
    device = next(model.parameters()).device
    vocab = int(config.vocab_size)
    prompts = [[(7 * place + 11 * index + 3) % vocab for place in range(n)] for index, n in enumerate(_PROMPTS)]
    added = [[(5 * step + 3 * index + 1) % vocab for step in range(_ADDED)] for index in range(3)]
    whole = [prompts[0] + added[0], prompts[0] + added[1], prompts[1] + added[2]]
    engine = Engine(model, device)
    with sampling_mode(model, kv_attention.NAME):
        cached = [Prompt(ids) for ids in prompts]
        engine.prefill(cached)
        for prompt in (cached[0], cached[0], cached[1]):
            engine.start(prompt)
        for step in range(_ADDED):
            logits_RV = engine.decode([tokens[step] for tokens in added])
    strange = _strange_layers(config, engine.layers)
    if strange is not None:
        return strange
    with sampling_mode(model):
        rows = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1] for ids in whole]
    plain_RV = torch.stack(rows)
    difference = float((logits_RV.float() - plain_RV.float()).abs().max() / plain_RV.float().std())
    allowed = 1e-4 if plain_RV.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) else 5e-2
    if not difference <= allowed:
        return f"its logits differ from a plain forward's by {difference:.1e} standard deviations"
    return None


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
