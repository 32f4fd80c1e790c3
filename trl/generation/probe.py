"""Whether the local engine computes what a model computes: one probe of the rows that `models.forward` probes too."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl.data.records import PackedBatch
from trl.generation.captured import CapturedEngine, as_steps_need
from trl.generation.engine import Engine
from trl.generation.kv_attention import cached_attention
from trl.generation.kv_cache import Prompt
from trl.generation.rows import Stepper
from trl.generation.sampler import SamplingParams
from trl.models.forward import (
    PROBE_ERRORS,
    Generates,
    eval_no_grad,
    in_float32,
    note,
    padded_inputs_of,
    plan_of,
    probe_rows,
    runs_in_float32,
)
from trl.models.precision import EXACT, TOLERANCES, precision_of
from trl.models.scoring import plain_forward
from trl.models.unwrap import (
    accepts,
    below_peft,
    below_value_head,
    is_encoder_decoder,
    learns_prompt,
    own_pace,
    reads_rows,
)

logger = logging.getLogger(__name__)

MOST_ROUNDING = 4
"""times as far as rounding puts a plain forward from float32: how far the engine's logits may be from that forward's"""


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
    ours_SV, windows = _ours(model, packed)
    strange = _strange_layers(config, windows)
    if strange is not None:
        return strange
    return _differ(model, ours_SV, lambda: _ours(model, packed)[0], lambda: _plain(model, packed))


def _differ(
    model: Any, ours_SV: Tensor, ours: Callable[[], Tensor], plain: Callable[[], tuple[Tensor, str]]
) -> str | None:
    """That the engine's logits are not a plain forward's, by more than rounding; None where they are."""
    plain_SV, precision = plain()
    difference = _far(ours_SV, plain_SV)
    if difference <= TOLERANCES[precision].logits:
        return None
    if precision not in EXACT and runs_in_float32(model):  # rounding adds up in many layers
        with in_float32(model):
            exact_SV, _ = plain()
            off = _far(ours(), exact_SV)
        if off <= TOLERANCES["float32"].logits and difference <= MOST_ROUNDING * _far(plain_SV, exact_SV):
            return None
    return f"its logits differ from a plain forward's by {difference:.1e} standard deviations"


def _far(ours_SV: Tensor, plain_SV: Tensor) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float((ours_SV.float() - plain_SV.float()).abs().max() / plain_SV.float().std())


def _plain(model: Any, packed: PackedBatch) -> tuple[Tensor, str]:
    with eval_no_grad(model):
        return plain_forward(model, packed, lambda head, states_SD: head.logits(states_SD))


def _ours(model: Any, packed: PackedBatch) -> tuple[Tensor, dict[int, int | None]]:
    """Logits by the engine of the model's device, [S, V], and the window of each layer that it has computed."""
    with eval_no_grad(model), cached_attention(model):
        if packed.ids_N.device.type == "cuda":
            return by_captured(model, packed)
        engine = Engine(model, packed.ids_N.device)
        return _by_engine(engine, packed), engine.layers


# -- pictures ----------------------------------------------------------------------------------

CAUSAL, BOTH_WAYS, NOT_HERE = "causal", "both ways", ""
"""a token of a picture sees those before it, or all of the picture; or the engine's logits are not the model's"""


def how_it_reads_pictures(model: Any) -> str:
    """How the engine reads the pictures of a prompt so that its logits are the model's; found out once, said once."""
    network = below_value_head(model)
    plan = plan_of(network)
    if plan.reads_pictures is None:
        found, why = _compare_pictures(network)
        plan = note(network, replace(plan_of(network), reads_pictures=found))
        if found == NOT_HERE:
            logger.warning(
                "%s: the local engine does not read pictures as the model does (%s). Prompts with pictures are sampled "
                "by its own `generate`, which is slower; prompts of text as before.",
                type(below_peft(network)).__name__,
                why,
            )
    assert plan.reads_pictures is not None
    return plan.reads_pictures


def _compare_pictures(model: Any) -> tuple[str, str]:
    """By rows with two sample pictures, each of which the model's own call reads alone; and why none is the same."""
    from trl.models.pictures import each_alone, picture_rows

    packed = picture_rows(model)
    alone = each_alone(packed)

    def ours(way: str) -> Tensor:
        with eval_no_grad(model), cached_attention(model):
            return _by_engine(Engine(model, packed.ids_N.device, both_ways=way == BOTH_WAYS), packed)

    def plain() -> tuple[Tensor, str]:
        with eval_no_grad(model):
            logits = [model(**padded_inputs_of(model, row)).logits[0, row.scored_S] for row in alone]
            return torch.cat(logits), precision_of(model)

    reasons = []
    try:
        for way in (CAUSAL, BOTH_WAYS):
            reasons.append(_differ(model, ours(way), partial(ours, way), plain))
            if reasons[-1] is None:
                return way, ""
    except PROBE_ERRORS as error:
        return NOT_HERE, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return NOT_HERE, str(reasons[0])


def _texts(packed: PackedBatch) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """The prompt and the branch of each row."""
    rows = [packed.ids_N[packed.row_indices(row)].tolist() for row in range(packed.rows)]
    pairs = list(zip(rows, packed.prompt_tokens, strict=True))
    return [tuple(row[:length]) for row, length in pairs], [row[length:] for row, length in pairs]


def _by_engine(engine: Engine, packed: PackedBatch) -> Tensor:
    """The logits that predict the tokens of each branch: each prompt is read once, then a step adds a token. [S, V]"""
    texts, branches = _texts(packed)
    prompts = {text: Prompt(list(text)) for text in texts}
    engine.prefill(list(prompts.values()))
    steps = [torch.stack([prompts[text].logits_V for text in texts])]  # type: ignore[misc]
    for text in texts:
        engine.start(prompts[text])
    for step in range(packed.width - 1):
        steps.append(engine.decode([branch[step] if step < len(branch) else 0 for branch in branches]))
    return torch.stack(steps, 1)[packed.row_S, packed.slot_S]


def by_captured(model: Any, packed: PackedBatch) -> tuple[Tensor, dict[int, int | None]]:
    """`_by_engine` by the engine of a GPU, and the layers' windows."""
    stepper = Stepper(SamplingParams(max_new_tokens=packed.width), (), None, packed.ids_N.device)
    engine = CapturedEngine(model, stepper, packed.ids_N.device, max_rows=None, max_prefill_tokens=2**20)
    with as_steps_need(model, packed.ids_N.device):
        steps_RTV = engine.forced(*_texts(packed), packed.width)
    return steps_RTV[packed.row_S, packed.slot_S], engine.layers


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


# -- `generate` --------------------------------------------------------------------------------

STEPS = 3
"""tokens that the probe of `generate` draws"""


def generates(model: Any) -> Generates:
    """How a causal language model's `generate` computes rows together as it computes them alone; found out once."""
    network = below_value_head(model)
    base = below_peft(network)
    if is_encoder_decoder(network) or learns_prompt(network) or not isinstance(base, PreTrainedModel):
        return Generates()
    plan = plan_of(network)
    if plan.generates is None:
        asked: Any = network if reads_rows(network) else base
        try:
            found = _how_it_generates(asked)
        except PROBE_ERRORS as error:
            logger.debug("probe of %s.generate failed: %s", type(base).__name__, error)
            found = Generates()
        plan = note(network, replace(plan_of(network), generates=found))
        if found != Generates():
            shortcomings = [] if found.behind_padding else ["rows behind padding"]
            shortcomings += [] if found.with_cache else ["several rows from its cache"]
            logger.warning(
                "%s.generate computes %s otherwise than each row alone: %s (same results, slower).",
                type(base).__name__,
                " and ".join(shortcomings),
                "prompts of one length run together" + ("" if found.with_cache else ", without the cache"),
            )
    assert plan.generates is not None
    return plan.generates


def _how_it_generates(model: Any) -> Generates:
    """RWKV and RecurrentGemma take padding into their state; RWKV's state of several rows mixes them."""
    packed, _ = probe_rows(model)
    ids_BL = torch.stack([packed.ids_N[packed.row_indices(row)[:4]] for row in range(2)])
    with eval_no_grad(model):
        cached = _is_plain(model, ids_BL, 0, use_cache=True)
        return Generates(_is_plain(model, ids_BL, ids_BL.shape[1], use_cache=cached), cached)


def _is_plain(model: Any, ids_BL: Tensor, room: int, *, use_cache: bool) -> bool:
    """Whether the logits in `generate`, behind so many tokens of padding, are those of passes of each row alone.

    The padding are tokens that have a meaning: the padding token may have none before it is trained.
    """
    length = ids_BL.shape[1]
    rows, mask = torch.cat([ids_BL.flip(1)[:, :room], ids_BL], 1), torch.ones_like(ids_BL)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=STEPS, do_sample=False, use_cache=use_cache, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    mask = torch.nn.functional.pad(mask, (room, 0))
    made = model.generate(input_ids=rows, attention_mask=mask, generation_config=config, **own_pace(model))
    texts = made.sequences[:, room:-1]
    alone = [model(input_ids=text[None], use_cache=False).logits[0, length - 1 :] for text in texts]
    ours, plain = torch.stack(made.logits, 1).float(), torch.stack(alone).float()
    return bool((ours - plain).abs().max() / plain.std() <= TOLERANCES[precision_of(model)].logits)
