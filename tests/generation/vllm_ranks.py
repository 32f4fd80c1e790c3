"""What two ranks, whose weights FSDP2 has sharded, give to engines."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loading_engine import LoadingEngine
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import lora, tiny_model

from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sync import ADAPTER, AdapterSync, EngineSync, FolderSync, HandSync, TransferApi, new_stamp
from trl.generation.vllm.verify import MismatchError, Verification

ROW = torch.arange(3, 20)[None]


def sharded(name: str, changes: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A model after a step of SGD in shards, and the same on this rank alone."""
    from peft import get_peft_model

    made = []
    for shards in (True, False):
        model = tiny_model(name)
        model = model if changes is None else get_peft_model(model, lora(name, **changes))
        if shards:
            network = model.get_base_model() if changes is not None else model
            for layer in network.model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
        model(input_ids=ROW, labels=ROW).loss.backward()
        optimizer.step()
        made.append(model)
    return made[0], made[1]


def apart(one: dict[str, torch.Tensor], model: Any) -> float:
    """The largest difference of weights; what a step differs by in another order of sums is some 1e-8."""
    other = model.state_dict()
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in other)


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.full_tensor() for name, weight in model.state_dict().items()}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def work(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    with tempfile.TemporaryDirectory() as own:
        folder = Path(path).parent / "way"
        found = {
            **in_folders(rank, folder), **adapters(rank, folder), **by_hand(own), **transfers(rank),
            **failures(rank, Path(own)), "checks": checks(rank), "stamp": new_stamp(),
        }  # fmt: skip
        found["left"] = [str(each) for each in folder.iterdir()]
    torch.save(found, f"{path}-{rank}")


def in_folders(rank: int, folder: Path) -> dict[str, Any]:
    """Whole weights, tied and untied, and a DoRA adapter merged."""
    found = {}
    for name, changes in (("qwen2", None), ("llama", None), ("llama", {"use_dora": True})):
        policy, alone = sharded(name, changes)
        engine = LoadingEngine(tiny_model(name))
        FolderSync(policy, folder).push(engine, "run-0")
        if changes is None:
            full = whole(policy)
            same = all(torch.equal(engine.model.state_dict()[key], full[key]) for key in full)
            found[name] = (same, apart(full, alone))
        else:
            found["dora"] = float((engine.model(ROW).logits - alone(ROW).logits).abs().max())
        found[f"calls {name} {bool(changes)}"] = len(engine.calls)
    return found


def adapters(rank: int, folder: Path) -> dict[str, Any]:
    policy, alone = sharded("llama", {})
    engine, way = LoadingEngine(tiny_model("llama")), AdapterSync(policy, folder)
    way.push(engine, "run-0")
    given = float((engine.adapters[ADAPTER](ROW).logits - alone(ROW).logits).abs().max()) if rank == 0 else None
    anew = LoadingEngine(tiny_model("llama"))
    way.again(anew, "run-0")  # each rank can read the folder
    dist.barrier()
    way.close()
    again = float((anew.adapters[ADAPTER](ROW).logits - alone(ROW).logits).abs().max())
    return {"adapter": given, "adapter again": again}


def by_hand(own: str) -> dict[str, Any]:
    """Each rank has an engine of its own."""
    policy, alone = sharded("qwen2")
    engine, other = LoadingEngine(tiny_model("qwen2")), LoadingEngine(tiny_model("qwen2"))
    HandSync(policy).push(engine, "run-0")
    FolderSync(policy, Path(own).parent / "shared", own_engines=True).push(other, "run-0")
    return {"by hand": apart(engine.model.state_dict(), alone), "own folder": apart(other.model.state_dict(), alone)}


class Transfer:
    """A sender, or another rank, of vLLM's own transfer."""

    def __init__(self, info: dict[str, Any], source: Any, fails: bool) -> None:
        self.sends, self.source, self.fails = info["rank"] == 0, source, fails
        self.got: dict[str, torch.Tensor] = {}

    def send_weights(self) -> None:
        for place, (name, tensor) in enumerate(self.source):
            if self.sends and self.fails and place == 1:
                raise RuntimeError("NCCL error")
            if self.sends:
                self.got[name] = tensor.clone()

    def shutdown(self) -> None:
        pass


def transfers(rank: int) -> dict[str, Any]:
    policy, alone = sharded("qwen2")
    opened: list[Transfer] = []

    def api(fails: bool) -> TransferApi:
        def trainer_init(info: dict[str, Any], *, client: Any, source: Any) -> Transfer:
            opened.append(Transfer(info, source, fails))
            return opened[-1]

        return TransferApi(trainer_init, str, lambda **given: given, lambda **given: given, lambda *given: given)

    engine = LoadingEngine(tiny_model("qwen2"))
    EngineSync(policy, ["http://127.0.0.1:1"], api=lambda: api(False)).push(engine, "run-0")
    sent = apart(opened[0].got, alone) if rank == 0 else len(opened[0].got)
    broken = error_of(lambda: EngineSync(policy, ["http://127.0.0.1:1"], api=lambda: api(True)).push(engine, "run-1"))
    return {"sent": sent, "broken": broken, "version": engine.version}


def failures(rank: int, own: Path) -> dict[str, Any]:
    """What goes wrong on the first rank alone."""
    policy, _ = sharded("llama")
    refuses = LoadingEngine(tiny_model("llama"), **({"reload_weights": "out of memory"} if rank == 0 else {}))
    (own / "file").touch()
    place = own / "file" if rank == 0 else own
    full = FolderSync(policy, own / "b")
    if rank == 0:
        full._folders.new = no_room  # type: ignore[method-assign]
    return {
        "refused": error_of(lambda: FolderSync(policy, own / "a").push(refuses, "run-0")),
        "no folder": error_of(lambda: FolderSync(policy, place).push(refuses, "run-0")),
        "no room": error_of(lambda: full.push(refuses, "run-0")),
    }


def no_room(size: int) -> Path:
    raise OSError("No space left on device")


def checks(rank: int) -> list[str]:
    """One rank's engine has other weights: all ranks hear of it."""
    model = tiny_model("llama")

    def score_of(wrong: bool) -> Callable[[list[list[int]], list[list[int]]], list[list[float]]]:
        number = -2.0 if wrong and rank == 1 else -1.0
        return lambda prompts, ids: [[number] * len(row) for row in ids]

    found = []
    for wrong in (False, True):
        verify = Verification(score_of(wrong), lambda: "float32", 60, dtype="float32", own_engines=True)
        engine = LoadingEngine(model)
        engine.version = "run-0"
        try:
            verify(engine, "run-0", None)
            found.append("right")
        except MismatchError as error:
            found.append(str(error)[:48])
    verify = Verification(score_of(False), lambda: "float32", 60, dtype="float32")
    silent = LoadingEngine(model, **({"generate": "gone"} if rank == 0 else {}))
    try:
        verify(silent, "default", None)
    except EngineError as error:
        found.append(str(error))
    assert os.environ["RANK"] == str(rank)
    return found
