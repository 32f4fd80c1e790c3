"""`trl merge`: an adapter and its model as one plain folder."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trl.scripts.open_model import (
    LANGUAGE_MODEL,
    Found,
    auto_class_of,
    find_model,
    head_of_adapter,
    labels_of,
    tokenizer_of,
)
from trl.scripts.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

SENTENCE = "The quick brown fox asks: what is 12 + 30? The answer is 42, and it is written down."
"""what both models are asked to continue, to see that they are the same"""
EXACT = 2e-3
"""largest difference of log-probabilities that single precision explains"""
HALF = 0.5
"""the same, where the weights are rounded to 16 bits"""


def command(
    adapter: Annotated[
        str, typer.Argument(help="Output folder of a run with an adapter, a checkpoint, or an adapter.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Model to merge into (default: the one it names).")] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Precision that is written; auto: as the base was saved."),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds.")] = False,
) -> None:
    """Merge an adapter into its model and write a plain folder that transformers, vLLM and others load.

    The folder gets the tokenizer (or processor) with its chat template and the generation config. It is checked that
    the merged model gives the log-probabilities of the adapter, and it appears when it is whole. Sums are made in
    float32.
    """
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `untie` sees to it
        found = mergeable(adapter, base)
        check_free(output, overwrite)
        told = merge(found, output, dtype, base)
    print(f"wrote {output}: {told}")


def mergeable(name: str, base: str | None = None) -> Found:
    """The adapter; ValueError for what cannot be merged, with the way out."""
    found = find_model(name)
    if found.adapter is None:
        raise ValueError(f"{name}: it is a whole model already, there is nothing to merge")
    kind = str(getattr(found.adapter.peft_type, "value", found.adapter.peft_type))
    if getattr(found.adapter, "is_prompt_learning", False) or getattr(found.adapter, "alora_invocation_tokens", None):
        what = "begins at certain tokens" if "LORA" in kind else "learns tokens before the prompt, not weights"
        raise ValueError(f"{name}: the adapter ({kind}) {what}, so it cannot be merged; `trl chat` uses it as it is")
    if base is not None:
        found.adapter.base_model_name_or_path = base
    _refuse_quantised(name, found.base)
    return found


def _refuse_quantised(name: str, base: str) -> None:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(base)
    except (OSError, ValueError):  # the loading itself says what is wrong
        return
    method = config.get("quantization_config")
    if method:
        kind = method.get("quant_method", "in few bits") if isinstance(method, dict) else "in few bits"
        raise ValueError(
            f"{name}: its base {base} is quantised ({kind}), and rounding would lose what was learned; merge it into "
            "the model that the base was made of: --base NAME"
        )


def check_free(output: Path, overwrite: bool) -> None:
    """ValueError where something is there that nobody asked to replace."""
    if output.is_file():
        raise ValueError(f"--output {output}: it is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output {output}: the folder is not empty; name another one, or add --overwrite")
    if output.is_dir() and overwrite and output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"--output {output}: the working folder lies in it, and would be replaced; name another one")


def merge(found: Found, output: Path, dtype: str = "auto", base: str | None = None) -> str:
    """Write the merged model, checked; returns what was checked, in words."""
    from trl.data.pictures import processor_of
    from trl.generation.stopping import end_tokens

    if output.resolve() == Path(found.place).resolve():
        raise ValueError(f"--output {output}: the adapter itself lies there; name another folder")
    adapted, saved_as = _load(found, base), _saved_dtype(found, dtype)
    tokenizer = tokenizer_of(found)
    reader = _reader_of(adapted, tokenizer)
    ids = _question(tokenizer, adapted)
    wanted = measured(adapted, ids, found.kind, reader)
    ends = end_tokens(adapted, tokenizer)
    untie(adapted)
    plain = adapted.merge_and_unload()
    _compare("the merged model", wanted, measured(plain, ids, found.kind, reader), EXACT)
    _speak_of_ends(plain, tokenizer, ends)
    with whole_folder(output) as folder:
        plain.to(saved_as).save_pretrained(folder)
        processor_of(tokenizer).save_pretrained(folder)
        del plain, adapted
        again = _reload(found, folder)
        exact = str(saved_as).endswith(("float32", "float64"))
        off = _compare("the folder", wanted, measured(again, ids, found.kind, reader), EXACT if exact else HALF)
    name = str(saved_as).removeprefix("torch.")
    seen = " below a picture" if reader is not None else ""
    what = "scores" if found.kind != LANGUAGE_MODEL else "log-probabilities"
    rounded = "" if exact else f", by rounding to {name} (--dtype float32 keeps all)"
    return f"{name}, its {what} of {len(ids)} tokens{seen} are the adapter's (largest difference {off:.1g}{rounded})"


def _load(found: Found, base: str | None) -> Any:
    """The adapter on its base, in float32."""
    from trl.models.peft_support import load_adapter
    from trl.models.prepare import load_model

    keywords: dict[str, Any] = {"dtype": "float32", **labels_of(found)}
    with head_of_adapter(found):
        if base is None:
            return load_model(found.place, auto_class_of(found), keywords, frozen=True).eval()
        below = load_model(base, auto_class_of(found), keywords, frozen=True)
        return load_adapter(below, found.place, is_trainable=False).eval()


def _reload(found: Found, folder: Path) -> Any:
    from trl.models.prepare import load_model

    return load_model(str(folder), auto_class_of(replace(found, adapter=None, place=str(folder))),
                      {"dtype": "float32"}, frozen=True).eval()  # fmt: skip


def _saved_dtype(found: Found, dtype: str) -> Any:
    """The precision to write."""
    import torch
    from transformers import PreTrainedConfig

    if dtype == "auto":
        config, _ = PreTrainedConfig.get_config_dict(found.base)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return getattr(torch, dtype)


def untie(adapted: Any) -> None:
    """Give the head weights of its own where the adapter changes only one of head and embedding."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or table is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    layers: Any = BaseTunerLayer
    inner = [each.get_base_layer() if isinstance(each, layers) else each for each in (head, table)]
    changed = [isinstance(each, layers) or hasattr(each, "modules_to_save") for each in (head, table)]
    if not any(changed):
        return
    if getattr(inner[0], "weight", None) is getattr(inner[1], "weight", None) and inner[0].weight is not None:
        inner[0].weight = torch.nn.Parameter(inner[0].weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _reader_of(model: Any, tokenizer: Any) -> Any:
    """What reads pictures for the model; None where it reads none."""
    from trl.data.pictures import reader_of
    from trl.models import pictures

    pictures.introduce(model, reader_of(tokenizer))
    return pictures.reader_for(model)


def _question(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that both models can read."""
    from trl.models.prepare import embedding_rows

    rows = embedding_rows(model) or 0
    ids = [token for token in tokenizer(SENTENCE)["input_ids"] if token < rows]
    return ids[:32] if len(ids) > 1 else list(range(min(rows, 16)))


def measured(model: Any, ids: list[int], kind: str, reader: Any = None) -> Tensor:
    """The log-probabilities of the tokens, or a classifier's scores, in float32.

    reader: what reads pictures for the model; one of its samples stands before the tokens then.
    """
    import torch

    from trl.models.unwrap import is_encoder_decoder

    given = torch.tensor([[*(reader.ids_of(reader.samples[0]) if reader is not None else ()), *ids]])
    with torch.no_grad():
        more = {"decoder_input_ids": given} if kind == LANGUAGE_MODEL and is_encoder_decoder(model) else {}
        if reader is not None:
            from trl.models import pictures

            pictures.introduce(model, reader)
            more = pictures.keywords(model, given)
            given = pictures.as_placeholders(model, given)
        logits: Tensor = model(input_ids=given, attention_mask=torch.ones_like(given), **more).logits.float()
    if kind != LANGUAGE_MODEL:
        return logits.flatten()
    found: Tensor = logits[0, :-1].log_softmax(-1).gather(1, given[0, 1:, None]).flatten()
    return found


def _compare(what: str, wanted: Tensor, got: Tensor, most: float) -> float:
    """The largest difference; ValueError where it is more than rounding explains."""
    off = float((wanted - got).abs().max())
    if not off <= most * max(1.0, float(wanted.abs().max()) / 10):
        raise ValueError(
            f"{what} differs from the adapter by {off:.2g} in log-probability, more than rounding explains; nothing is "
            "written (--dtype float32 if the base's precision is coarse, --base if the adapter was made on another one)"
        )
    return off


def _speak_of_ends(model: Any, tokenizer: Any, ends: tuple[int, ...]) -> None:
    """Tell `generate` which tokens end an answer: those of the tokenizer too, with which it was trained."""
    config = getattr(model, "generation_config", None)
    if config is None or not ends:
        return
    config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `output` when all is written; after an error nothing has changed."""
    from trl.models.weight_files import SAVING, hidden, put_in_place

    output = Path(os.path.abspath(output))
    beside = hidden(output, SAVING)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        put_in_place(beside, output)
    except OSError as error:
        raise OSError(f"could not write {output}: {error.strerror or error}; nothing there has changed") from error
    finally:
        if beside.exists():
            shutil.rmtree(beside, ignore_errors=True)
