"""Ranks that compute each row together: `context_parallel_size`, or accelerate's `ParallelismConfig(cp_size=...)`.

accelerate deals each batch to all ranks of a group, and shards weights over them (FSDP2). Its own context parallelism,
which replaces `scaled_dot_product_attention` by a ring, knows one causal sequence a row and no packed ones. So rows are
cut in the forward pass here (`kernels.context_parallel`), and not by accelerate.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType
from torch import nn

from trl.data.records import PackedBatch
from trl.kernels.layers import is_compiled
from trl.models.forward import is_encoder, is_sharing, rows_shared
from trl.models.scoring import check_shared
from trl.models.unwrap import below_value_head, is_encoder_decoder, learns_prompt, reads_rows
from trl.trainer.configuration import PostTrainingConfig
from trl.trainer.settings import check_parallelism

logger = logging.getLogger(__name__)


class CutElsewhere(ParallelismConfig):
    """A `ParallelismConfig` for accelerate and `Trainer` while they train: rows are cut, but not by them."""

    @property
    def cp_enabled(self) -> bool:
        return False


def share_rows(args: PostTrainingConfig) -> int:
    """How many ranks the settings want to compute each row together.

    Where accelerate shards weights (FSDP2), the settings are changed so that it shards them over these ranks too; for
    DDP it knows of no such ranks.
    """
    size = args.ranks_of_a_row
    sharded = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if size > 1 and not sharded:
        args.parallelism_config = None
    elif size > 1 and args.parallelism_config is None and args.world_size % size == 0:
        args.parallelism_config = ParallelismConfig(cp_size=size, dp_shard_size=args.world_size // size)
    return size


class SharedRows:
    """The ranks that compute each row together with this one; with `size` 1 there is none but itself."""

    def __init__(self, accelerator: Accelerator, asked: int, takes: bool, owner: str):
        """asked: how many. takes: whether the trainer can; ValueError where anybody asked for what it cannot."""
        given = accelerator.parallelism_config if accelerator.num_processes > 1 else None
        if given is not None:
            check_parallelism(given, takes, owner)
        self._accelerator = accelerator
        self.size = max(asked, 1 if given is None else given.cp_size)
        self.group: Any = None
        self.rank = 0
        """of this process among them"""
        if self.size == 1:
            return
        self._check(accelerator, asked, given)
        self._mesh, self._config = accelerator.torch_device_mesh, object.__new__(CutElsewhere)
        if given is None or not given.cp_enabled:  # DDP, for which accelerate makes no such mesh
            given = ParallelismConfig(cp_size=self.size, dp_shard_size=self.data_world)
            self._mesh = given.build_device_mesh(accelerator.device.type)
        self._config.__dict__.update(vars(given))
        self.group, self.rank = self._mesh["cp"].get_group(), self._mesh["cp"].get_local_rank()

    def _check(self, accelerator: Accelerator, asked: int, given: ParallelismConfig | None) -> None:
        if given is not None and given.cp_enabled and asked not in (1, given.cp_size):
            raise ValueError(
                f"context_parallel_size={asked}: accelerate was started with cp_size={given.cp_size}; give one of them"
            )
        if accelerator.num_processes % self.size:
            raise ValueError(
                f"context_parallel_size={self.size}: the number of processes, {accelerator.num_processes}, is no "
                "multiple of it; start more (`accelerate launch --num_processes N`), or leave it out"
            )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"context_parallel_size={self.size}: DeepSpeed deals other rows to each rank; take FSDP2 or DDP"
            )
        handler = None if given is None else given.cp_handler
        if getattr(handler, "cp_comm_strategy", "allgather") != "allgather" and accelerator.is_main_process:
            logger.warning("cp_comm_strategy='alltoall': has no effect: keys and values are always gathered")

    @property
    def data_rank(self) -> int:
        """Which share of the rows this process reads; the ranks that share rows have the same."""
        return self._accelerator.process_index // self.size

    @property
    def data_world(self) -> int:
        """In how many shares the rows are dealt."""
        return self._accelerator.num_processes // self.size

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it batches are dealt to all ranks of a group, which compute their packed rows together."""
        if self.size == 1:
            yield
            return
        state: Any = self._accelerator.state
        before = state.parallelism_config, state.device_mesh
        state.parallelism_config, state.device_mesh = self._config, self._mesh
        try:
            with rows_shared(self.group):
                yield
        finally:
            state.parallelism_config, state.device_mesh = before

    def check(self, model: nn.Module, refused: dict[str, bool]) -> None:
        """ValueError where rows of this model cannot be shared. refused: settings, and whether they are set.

        A model that is on its device already is tried; a sharded one at the first step.
        """
        for what, given in refused.items():
            if given:
                raise ValueError(f"context_parallel_size={self.size}: {what}; leave one of them out")
        kinds = {
            "an encoder and a decoder": is_encoder_decoder(model),
            "an encoder": is_encoder(model),
            "an adapter that learns virtual tokens": learns_prompt(model),
            "an adapter that begins at certain tokens": reads_rows(model),
            "layers that torch.compile made": is_compiled(below_value_head(model)),
        }
        name = type(below_value_head(model)).__name__
        for kind, found in kinds.items():
            if found:
                raise ValueError(
                    f"context_parallel_size={self.size}: {name} has {kind}, whose rows cannot be cut; leave it out"
                )
        if {weight.device.type for weight in model.parameters()} == {self._accelerator.device.type}:
            with self.held():
                check_shared(model)
        below_value_head(model).register_forward_pre_hook(_refuse_whole_rows, with_kwargs=True)

    def check_same(self, packs: Sequence[PackedBatch], step: int) -> None:
        """Collective: ValueError unless the ranks that share rows have the same ones."""
        if self.size == 1:
            return
        device = self._accelerator.device
        marks = torch.zeros(4, dtype=torch.int64, device=device)
        for number, packed in enumerate(packs, 1):
            for place, column in enumerate((packed.ids_N, packed.scored_S)):
                column = column.to(device)
                marks[place] += number * (column * torch.arange(1, len(column) + 1, device=device)).sum()
            marks[2:] += torch.tensor([1, len(packed.ids_N)], device=device)
        ends = torch.stack([marks, -marks])
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=self.group)
        if not torch.equal(ends[0], -ends[1]):
            raise ValueError(
                f"context_parallel_size={self.size}: the ranks that share rows read different ones for step {step}: a "
                "data set or data collator that draws at random must draw the same on all of them; seed it"
            )


def _refuse_whole_rows(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """ValueError for a pass that learns from whole rows, which every rank of a group would then learn from."""
    called = bool(args) or kwargs.get("input_ids") is not None or kwargs.get("inputs_embeds") is not None
    if called and is_sharing() and torch.is_grad_enabled() and getattr(kwargs.get("tree"), "piece", None) is None:
        raise ValueError(
            f"context_parallel_size: {type(network).__name__} is called on whole rows, which each of the ranks would "
            "learn: read log-probabilities by `trl.models.scoring.score(model, batch['packed'])`, or leave it out"
        )
