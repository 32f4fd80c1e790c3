"""The base of trainers that are driven by `step`, and the tags that every trainer puts on what it pushes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import PyTorchModelHubMixin


class BaseTrainer(PyTorchModelHubMixin):
    """What a step-driven trainer has to define; `save_pretrained` and `push_to_hub` come with it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        # The mixin would write the trainer's config as the model's config.json.
        self._hub_mixin_config = None

    def step(self, *args: Any) -> Any:
        """One optimisation step on a batch of experience."""
        raise NotImplementedError("Not implemented")

    def loss(self, *args: Any) -> Any:
        """The loss of a minibatch."""
        raise NotImplementedError("Not implemented")

    def compute_rewards(self, *args: Any) -> Any:
        """The rewards that `step` learns from."""
        raise NotImplementedError("Not implemented")

    def _save_pretrained(self, save_directory: Any) -> None:
        raise NotImplementedError("Not implemented")


def trl_sanitze_kwargs_for_tagging(
    tag_names: str | Sequence[str], kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """`kwargs` of a `push_to_hub` with `tag_names` among their `tags`: behind a list of tags, before a single one."""
    if kwargs is None:
        return None
    ours = [tag_names] if isinstance(tag_names, str) else list(tag_names)
    theirs = kwargs.get("tags")
    tags = [*ours, theirs] if isinstance(theirs, str) else [*(theirs or ()), *ours]
    return {**kwargs, "tags": tags}
