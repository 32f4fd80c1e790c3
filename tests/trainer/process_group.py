"""How a rank of a test comes and goes."""

import gc
import os
import warnings

import torch


def join_group(rank: int, world: int, port: int) -> None:
    """Make this process a rank of a gloo group, on the CPU and with one thread."""
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1",
    )  # fmt: skip


def leave_group() -> None:
    """Call it once nothing holds the trainer any more.

    Where DDP's reducer is the last to let go of a gloo group, its destructor waits for gloo's thread with the GIL held,
    and that thread may be waiting for the GIL: so the wrapped models go first, then the group.
    """
    gc.collect()
    torch.distributed.destroy_process_group()
