"""Which sampler serves a model."""

import logging
from typing import Any

from trl.generation.local import LocalSampler
from trl.generation.probe import NotLocal
from trl.generation.sampler import Sampler
from trl.generation.transformers_sampler import TransformersSampler

logger = logging.getLogger(__name__)


def make_sampler(model: Any, tokenizer: Any = None, *, max_rows: int = 128) -> Sampler:
    """The local engine where it computes what the model computes; else `model.generate`, which is logged."""
    try:
        return LocalSampler(model, tokenizer, max_rows=max_rows)
    except NotLocal as error:
        logger.warning("%s. It samples by its own `generate`, which is slower.", error)
    return TransformersSampler(model, tokenizer, max_rows=max_rows)
