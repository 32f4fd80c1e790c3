"""What makes the host wait for the device between logs: one read before each optimizer step, and nothing else."""

import conformity
import pytest
import torch
from device_syncs import Functions, Operations, Syncs, pretended_device
from ppo_cases import batch, causal
from tokenizers_for_tests import word_tokenizer
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import TrainerCallback

from trl.data.packing import pack
from trl.data.records import Batch, Branch, TokenTree

ONCE = "tally.py"
ELSEWHERE = "head_tiles.py"
"""the head's tiles, which are the CPU's; a GPU has a path of its own"""


class Between(TrainerCallback):
    """Counts from the end of the first optimizer step to that of the third, loading and moving of batches included."""

    def __init__(self, syncs):
        self.syncs = syncs

    def on_step_end(self, args, state, control, **kwargs):
        self.syncs.counting = state.global_step < 3


def without_head(found):
    return {line: times for line, times in found.items() if ELSEWHERE not in line}


@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "kto", "reward", "grpo", "rloo"])
def test_one_read_an_optimizer_step(case, tmp_path, monkeypatch):
    """Two micro-batches a step; of GRPO and RLOO the updates of one rollout."""
    on_policy = {"num_iterations": 4} if case in ("grpo", "rloo") else {}
    trainer = conformity.build(
        case, tmp_path, max_steps=3, logging_steps=100, gradient_accumulation_steps=2, **on_policy
    )
    references = [model for model in [getattr(trainer, "ref_model", None)] if model is not None]
    with pretended_device(monkeypatch, trainer.model, *references) as syncs:
        trainer.add_callback(Between(syncs))
        trainer.train()
    found = without_head(syncs.found)
    assert sum(found.values()) == 2, found  # two steps
    assert all(line.startswith(f"tolist {ONCE}") for line in found), found


def test_the_count_sees_what_waits():
    """Numbers that are read, shapes that follow from numbers, and numbers of the host; not what a device does alone."""
    syncs = Syncs()
    with Functions(syncs), Operations(syncs):
        there = torch.arange(6.0, device="cpu")
        syncs.counting = True
        quiet = [there * 2, there[torch.tensor([0, 2])], there.sum(), there.sort(), torch.zeros(3, device="cpu")]
        host = torch.arange(3)
        quiet += [host.tolist(), host.unique(), host.sum().item(), torch.full((), 2.0, device="cpu")]
        assert not syncs.found, syncs.found
        waits = {
            "item": lambda: there.sum().item(),
            "tolist": lambda: (there + 1).tolist(),
            "float": lambda: float(there[0]),
            "bool": lambda: bool(there.any()),
            "cpu": lambda: there.cpu(),
            "numpy": lambda: there.numpy(),
            "nonzero": lambda: there.nonzero(),
            "mask": lambda: there[there > 2],
            "unique": lambda: there.unique(),
            "select": lambda: there.masked_select(there > 2),
            "bincount": lambda: there.long().bincount(),
            "repeat": lambda: there.repeat_interleave(there.long()),
            "from": lambda: torch.tensor([1.0], device="cpu"),
        }
        for name, wait in waits.items():
            syncs.found.clear()
            wait()
            assert sum(syncs.found.values()) == 1, (name, syncs.found)


def test_a_moved_batch_knows_its_host_indices():
    packed = pack([TokenTree([1, 2], [Branch([3, 4]), Branch([5])])])
    moved = packed.to("meta")
    assert moved.scored_S.device.type == "meta"
    assert moved.on_host(moved.scored_S) is packed.scored_S
    assert moved.on_host(moved.last_B).tolist() == packed.last_B.tolist()
    other = torch.zeros(2)
    assert moved.on_host(other) is other
    assert moved.to("meta").on_host(moved.scored_S) is packed.scored_S  # moved twice


def test_a_data_loader_pins_a_batch(monkeypatch):
    """torch's loader asks a record for `pin_memory`; what is no tensor stays."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    packed = pack([TokenTree([1, 2], [Branch([3, 4]), Branch([5])])])
    pinned = pin_memory(Batch(packed=packed, name="x"))["packed"]
    assert pinned.ids_N.tolist() == [101, 102, 103, 104, 105]
    assert pinned.scored_S.tolist() == (packed.scored_S + 100).tolist()
    assert pinned.segments == packed.segments


STATISTICS = ("ppo_statistics.py", "core.py", "measure.py")
"""what `step` returns is numbers of the host, of the whole batch"""


@pytest.mark.filterwarnings("ignore:No dataset is provided")
def test_updates_of_ppo(monkeypatch):
    """Of `PPOTrainer.step`: a read for each of four optimizer steps, and how many ratios there are, once."""
    from trl import PPOConfig, PPOTrainer

    config = PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3, ppo_epochs=2)
    trainer = PPOTrainer(config, causal(), tokenizer=word_tokenizer())
    with pretended_device(monkeypatch, trainer.model, trainer.ref_model) as syncs:
        trainer.step(*batch())
        syncs.counting = True
        trainer.step(*batch(seed=2))
        syncs.counting = False
    found = {line: n for line, n in without_head(syncs.found).items() if not any(name in line for name in STATISTICS)}
    assert {line.split()[1].split(":")[0]: n for line, n in found.items() if "tolist" in line} == {ONCE: 4}, found
    assert sum(found.values()) == 5, found
