"""Translates the keywords of transformers' `generate` into the parameters of the samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.generation.sampler import SamplingParams
from trl.models.unwrap import below_peft

_DEFAULTS = {  # those of transformers
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "max_new_tokens": 20, "min_new_tokens": 0, "min_length": 0,
}  # fmt: skip
OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""keywords that ask for more than the tokens"""
_WITHOUT_EFFECT = {  # on what is sampled
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation",
    "transformers_version",
}  # fmt: skip
_OFF = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


def asked_end_tokens(generation_kwargs: Mapping[str, Any], config: Any = None) -> tuple[int, ...] | None:
    """The end tokens that the keywords or else the `generation_config` name; -1 or None as a keyword: no token ends it.

    None: neither names any.
    """
    ends = getattr(config or generation_kwargs.get("generation_config"), "eos_token_id", None)
    if "eos_token_id" in generation_kwargs:
        ends = -1 if generation_kwargs["eos_token_id"] is None else generation_kwargs["eos_token_id"]
    if ends is None:
        return None
    return tuple(int(end) for end in (ends if isinstance(ends, Sequence) else [ends]) if end >= 0)


def sampling_params(
    model: Any,
    generation_kwargs: Mapping[str, Any],
    *,
    stop_strings: Sequence[str] = (),
    seed: int | tuple[int, ...] | None = None,
) -> SamplingParams | None:
    """Parameters with which a sampler does what `model.generate(**generation_kwargs)` does; None if no sampler can.

    The model's `generation_config` and transformers' defaults apply where a keyword is missing, so that
    `do_sample=True` alone means `top_k=50`.
    """
    keywords = dict(generation_kwargs)
    config = keywords.pop("generation_config", None) or getattr(below_peft(model), "generation_config", None)
    public = {name: value for name, value in vars(config).items() if name[0] != "_"} if config else {}
    asked = {**_DEFAULTS, **_given(public), **_given(keywords)}
    if not all(_is_off(name, value) for name, value in asked.items() if name not in (*_DEFAULTS, "eos_token_id")):
        return None
    if asked["min_length"] > 0:  # it counts the tokens of the prompt too
        return None
    sampled = bool(asked["do_sample"])
    if sampled and not asked["temperature"] > 0:
        return None
    return SamplingParams(
        max_new_tokens=asked["max_new_tokens"],
        min_new_tokens=asked["min_new_tokens"],
        temperature=asked["temperature"] if sampled else 0.0,
        top_k=int(asked["top_k"]) if sampled else 0,
        top_p=asked["top_p"] if sampled else 1.0,
        min_p=asked["min_p"] if sampled else 0.0,
        repetition_penalty=asked["repetition_penalty"],
        stop_token_ids=asked_end_tokens(generation_kwargs, config),
        stop_strings=tuple(stop_strings),
        seed=seed,
    )


def unknown_to_samplers(settings: Mapping[str, Any]) -> list[str]:
    """Names of keywords of `generate` that change what is drawn, and that no sampler follows."""
    known = (*_DEFAULTS, "eos_token_id", "stop_strings")
    return [name for name, value in _given(settings).items() if name not in known and not _is_off(name, value)]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _is_off(name: str, value: Any) -> bool:
    return name in _WITHOUT_EFFECT or value is None or value is False or (name in _OFF and value == _OFF[name])
