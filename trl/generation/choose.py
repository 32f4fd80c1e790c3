"""Which sampler serves a model."""

import logging
from typing import Any
from weakref import WeakSet

from trl.generation.local import LocalSampler
from trl.generation.probe import NotLocal
from trl.generation.sampler import Sampler
from trl.generation.transformers_sampler import TransformersSampler
from trl.models.unwrap import below_value_head

logger = logging.getLogger(__name__)
_told: WeakSet[Any] = WeakSet()


def make_sampler(model: Any, tokenizer: Any = None, *, max_rows: int = 128) -> Sampler:
    """The local engine where it computes what the model computes; else `model.generate`, which is said once a model."""
    try:
        return LocalSampler(model, tokenizer, max_rows=max_rows)
    except NotLocal as error:
        network = below_value_head(model)
        if network not in _told:
            _told.add(network)
            logger.warning("%s. It samples by its own `generate`, which is slower.", error)
    return TransformersSampler(model, tokenizer, max_rows=max_rows)
