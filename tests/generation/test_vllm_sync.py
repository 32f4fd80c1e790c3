"""The policy's weights reach an engine bit for bit, in each way, or an error says why not."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as t
import vllm_ranks
from loading_engine import LoadingEngine
from process_group import on_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import lora, tiny_model

from trl import AutoModelForCausalLMWithValueHead
from trl.generation.vllm import sync
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sync import ADAPTER, AdapterSync, EngineSync, FolderSync, HandSync, TransferApi, make_sync
from trl.models.served_weights import pieces_of, unserved_adapter

ROW = torch.arange(3, 20)[None]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor for piece in pieces_of(model) for name, tensor in zip(piece.names, piece.make(True), strict=True)
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def step(model: Any) -> None:
    """An optimizer step of SGD."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    model(input_ids=ROW, labels=ROW).loss.backward()
    optimizer.step()


def adapted(name: str = "llama", **changes: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(tiny_model(name), lora(name, **changes))


# -- whole weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_after_steps_the_engine_has_the_weights_bit_for_bit(name, tmp_path):
    policy = tiny_model(name)
    engine, way = LoadingEngine(policy), FolderSync(policy, tmp_path)
    for version in ("run-0", "run-1", "run-2"):
        way.push(engine, version)
        assert equal(engine.model.state_dict(), policy.state_dict())
        assert engine.version == version
        step(policy)
    assert not equal(engine.model.state_dict(), policy.state_dict())
    assert engine.calls[:5] == [
        "pause wait", "set_version run-0-unfinished", "reload_weights", "set_version run-0", "resume"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_in_several_files_and_a_tied_head_has_its_name(tmp_path, monkeypatch):
    policy = tiny_model("qwen2")
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    monkeypatch.setattr(sync, "SHARD_BYTES", 4000)
    sync.write_weights(pieces_of(policy), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    table = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 3
    assert {name: file.name for file in files for name in load_file(file)} == table
    assert torch.equal(load_file(tmp_path / table["lm_head.weight"])["lm_head.weight"], policy.lm_head.weight)


def test_a_copy_whose_head_is_its_own(tmp_path):
    policy = tiny_model("qwen2")
    policy.save_pretrained(tmp_path / "tied")
    sync.write_untied(str(tmp_path / "tied"), tmp_path / "untied")
    copy = t.AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert copy.lm_head.weight is not copy.model.embed_tokens.weight
    assert equal(copy.state_dict(), policy.state_dict())


def test_experts_have_the_names_of_their_checkpoint(tmp_path):
    torch.manual_seed(0)
    policy = t.AutoModelForCausalLM.from_config(
        t.MixtralConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        )
    )  # fmt: skip
    policy.save_pretrained(tmp_path)
    assert equal(state_of(policy), load_file(tmp_path / "model.safetensors"))
    assert any(".experts.1." in name for name in state_of(policy))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [3, 5]},
        {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
    ],
    ids=str,
)
def test_an_adapter_is_merged_into_a_copy_and_a_value_head_left_out(changes):
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(adapted(**changes)).eval()
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    plain = tiny_model("llama")
    plain.load_state_dict(state_of(policy))
    own = policy.pretrained_model(ROW).logits
    assert (plain(ROW).logits - own).abs().max() < 2e-6
    assert (tiny_model("llama")(ROW).logits - own).abs().max() > 1e-2
    assert equal(policy.state_dict(), before)


def test_a_prompt_that_is_learned_is_no_weight():
    from peft import PromptTuningConfig, get_peft_model

    policy = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"puts virtual tokens before the prompt.*use_vllm=False"):
        pieces_of(policy)


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_is_loaded_in_its_place_and_the_base_stays(name, tmp_path):
    policy = adapted()
    if name != "default":
        policy.add_adapter(name, lora("llama", r=4))
        policy.set_adapter(name)
    base = tiny_model("llama")
    engine, way = LoadingEngine(base), AdapterSync(policy, tmp_path)
    for version in ("run-0", "run-1"):
        way.push(engine, version)
        assert torch.equal(engine.adapters[ADAPTER](ROW).logits, policy(ROW).logits)
        assert equal(engine.model.state_dict(), base.state_dict())
        assert len(list(tmp_path.iterdir())) == 1  # the newest, which an engine may read again
        step(policy)
    assert len(set(engine.folders)) == 2  # vLLM knows keys and values of a prompt by the adapter's folder
    assert engine.calls.count("load_adapter policy") == 2
    way.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, None),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "single tokens"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "has changed the base"),
        ({"r": 32}, "rank 32 is above the engine's 16"),
        ({"rank_pattern": {"q_proj": 17}}, "rank 17 is above the engine's 16"),
    ],
    ids=str,
)
def test_which_adapters_vllm_can_serve(changes, said, caplog, tmp_path):
    policy = adapted(**changes)
    found = unserved_adapter(policy, max_rank=16)
    assert (found is None) == (said is None)
    way = make_sync(policy, folder=tmp_path, max_rank=16)
    assert type(way) is (AdapterSync if said is None else FolderSync)
    assert way.adapter == (ADAPTER if said is None else None)
    if said is not None:
        assert said in found
        assert caplog.text.count("it gets the merged weights whole") == 1
        with pytest.raises(ValueError, match=r"vllm_weight_sync='adapter'.*leave it 'auto'"):
            make_sync(policy, "adapter", max_rank=16)


def test_an_engine_that_was_started_without_adapters_is_asked_for_none(caplog):
    assert unserved_adapter(adapted(), max_rank=0) == "the engine takes none (--enable-lora)"
    assert isinstance(make_sync(adapted(), max_rank=0), FolderSync)
    assert "the engine takes none (--enable-lora)" in caplog.text


def test_a_norm_that_is_trained_beside_the_adapter_asks_for_whole_weights():
    policy = adapted()
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    assert "model.norm.weight is trained beside it" in unserved_adapter(policy)


def test_an_engine_that_refuses_the_first_adapter_gets_merged_weights(tmp_path, caplog):
    policy = adapted()
    engine = LoadingEngine(tiny_model("llama"), load_adapter="LoRA is not enabled")
    way = make_sync(policy, folder=tmp_path)
    way.push(engine, "run-0")
    assert way.adapter is None
    assert (engine.model(ROW).logits - policy(ROW).logits).abs().max() < 2e-6
    assert engine.version == "run-0"
    assert "LoRA is not enabled" in caplog.text
    step(policy)
    way.push(engine, "run-1")
    assert (engine.model(ROW).logits - policy(ROW).logits).abs().max() < 2e-6
    assert engine.calls.count("load_adapter policy") == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineError, match=r"LoRA is not enabled.*vllm_sync_folder"):
        make_sync(policy, "adapter", folder=tmp_path).push(engine, "run-2")


# -- failures --------------------------------------------------------------------------------------


def test_a_failed_push_leaves_no_stamp_that_anyone_expects(tmp_path):
    policy = tiny_model("llama")
    engine, way = LoadingEngine(policy), FolderSync(policy, tmp_path)
    way.push(engine, "run-0")
    engine.refuses["reload_weights"] = "no such folder"
    with pytest.raises(EngineError, match=r"no such folder; it was to load .*vllm_sync_folder"):
        way.push(engine, "run-1")
    assert engine.version == "run-1-unfinished"
    assert engine.calls[-1] == "resume"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no space"), SafetensorError("IoError: no space"), MemoryError("none")])
def test_a_rank_that_cannot_write_takes_part_to_the_end(error, tmp_path, monkeypatch):
    """The other ranks wait for it in each piece."""

    def fail(*given, **how):
        raise error

    made = []
    pieces = [
        replace(piece, make=lambda keep, of=piece.make: (made.append(keep), of(keep))[1])
        for piece in pieces_of(tiny_model("llama"))
    ]
    monkeypatch.setattr(sync, "SHARD_BYTES", 1)
    monkeypatch.setattr(sync, "save_file", fail)
    with pytest.raises(type(error), match=str(error)):
        sync.write_weights(pieces, tmp_path)
    assert made == [True, *[False] * (len(pieces) - 1)]


def test_an_engine_that_has_lost_the_weights_gets_the_same_ones(tmp_path, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 1000780000")  # as in some containers

    monkeypatch.setattr("getpass.getuser", nameless)
    policy = tiny_model("llama")
    way = FolderSync(policy, tmp_path)
    with pytest.raises(EngineError, match="has lost the weights"):
        way.again(LoadingEngine(policy), "run-0")
    way.push(LoadingEngine(policy), "run-0")
    anew = LoadingEngine(tiny_model("llama", tie_word_embeddings=False))
    way.again(anew, "run-0")
    assert equal(anew.model.state_dict(), policy.state_dict())
    way.again(anew, "run-0")  # another rank has done it already
    assert anew.calls.count("reload_weights") == 1
    step(policy)
    with pytest.raises(EngineError, match="'run-0', and the policy has others by now"):
        way.again(LoadingEngine(policy), "run-0")


def test_an_adapter_is_given_again_as_it_was_pushed(tmp_path):
    policy = adapted()
    way = AdapterSync(policy, tmp_path)
    way.push(LoadingEngine(tiny_model("llama")), "run-0")
    before = policy(ROW).logits
    step(policy)
    anew = LoadingEngine(tiny_model("llama"))
    way.again(anew, "run-0")
    assert torch.equal(anew.adapters[ADAPTER](ROW).logits, before)
    assert anew.version == "run-0"


def test_folders_of_dead_processes_are_removed_and_others_stay(tmp_path):
    dead, foreign = tmp_path / "trl-weights-dead", tmp_path / "models"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    (dead / ".lock").touch()
    first, second = sync._Folders(tmp_path), sync._Folders(tmp_path)
    mine = first.new(10)
    other = second.new(10)
    assert not dead.exists()
    assert mine.exists()
    first.remove(foreign)
    assert foreign.exists()
    del first
    assert not mine.exists()
    assert other.exists()


# -- vLLM's own transfer ---------------------------------------------------------------------------


@dataclass
class Info:
    kind: str
    rank: int
    packed: bool
    master_address: str = ""
    master_port: int = 0
    world_size: int = 0


class Transfers:
    """What `vllm.distributed.weight_transfer` is to `EngineSync`; received tensors go into a model."""

    def __init__(self, model: Any = None, fails_at: int | None = None) -> None:
        self.model, self.fails_at = model, fails_at
        self.calls: list[Any] = []
        self.made: list[str] = []

    def api(self) -> TransferApi:
        return TransferApi(
            self.trainer_init, lambda url: f"client of {url}", lambda **given: Info("nccl", **given),
            lambda **given: Info("ipc", **given), lambda name, dtype, shape: (name, dtype, shape),
        )  # fmt: skip

    def trainer_init(self, info: Info, *, client: Any, source: Any) -> "Transfer":
        self.calls.append((info, client))
        return Transfer(self, source)


class Transfer:
    def __init__(self, of: Transfers, source: Any) -> None:
        self.of, self.source = of, source

    def send_weights(self) -> None:
        self.of.calls.append("send")
        told, sent = self.source.metadata(), []
        for place, (name, tensor) in enumerate(self.source):
            if place == self.of.fails_at:
                raise RuntimeError("NCCL error: remote process exited")
            sent.append((name, tensor.dtype, tuple(tensor.shape)))
            if self.of.model is not None:
                self.of.model.state_dict()[name].copy_(tensor)
        assert sent == told
        assert self.source.held_names() is None

    def shutdown(self) -> None:
        self.of.calls.append("shutdown")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_vllms_own_transfer_is_opened_once_and_sends_each_time(name):
    policy = tiny_model(name)
    engine, there = LoadingEngine(policy), Transfers(LoadingEngine(policy).model)
    way = EngineSync(policy, ["http://127.0.0.1:8000", "http://127.0.0.1:8001"], workers=[2, 4], api=there.api)
    step(policy)
    way.push(engine, "run-0")
    step(policy)
    way.push(engine, "run-1")
    assert equal(there.model.state_dict(), policy.state_dict())
    assert there.calls == [
        (Info("nccl", 0, True, "127.0.0.1", 51216, 3), "client of http://127.0.0.1:8000"),
        (Info("nccl", 0, True, "127.0.0.1", 51217, 5), "client of http://127.0.0.1:8001"),
        "send", "send", "send", "send",
    ]  # fmt: skip
    assert engine.calls[-4:] == ["pause wait", "set_version run-1-unfinished", "set_version run-1", "resume"]


def test_a_transfer_that_breaks_off_is_an_error_and_is_opened_anew():
    policy, engine = tiny_model("llama"), LoadingEngine(tiny_model("llama"))
    there = Transfers(fails_at=2)
    way = EngineSync(policy, ["http://127.0.0.1:8000"], "ipc", api=there.api)
    with pytest.raises(EngineError, match="broke off: RuntimeError: NCCL error: remote process exited"):
        way.push(engine, "run-0")
    assert engine.version == "run-0-unfinished"
    assert engine.calls[-1] == "resume"
    there.fails_at = None
    way.push(engine, "run-0")
    assert there.calls == [
        (Info("ipc", 0, True), "client of http://127.0.0.1:8000"), "send", "shutdown",
        (Info("ipc", 0, True), "client of http://127.0.0.1:8000"), "send",
    ]  # fmt: skip
    assert engine.version == "run-0"


def test_an_engine_in_this_process_takes_the_tensors_themselves():
    policy = tiny_model("qwen2")
    engine, way = LoadingEngine(policy), HandSync(policy)
    step(policy)
    way.push(engine, "run-0")
    assert equal(engine.model.state_dict(), policy.state_dict())
    assert engine.calls == ["pause wait", "set_version run-0-unfinished", "take_weights", "set_version run-0", "resume"]
    engine.refuses["take_weights"] = "out of memory"
    with pytest.raises(EngineError, match="out of memory"):
        way.push(engine, "run-1")
    assert engine.version == "run-1-unfinished"


def test_after_a_failure_the_rest_is_still_made_for_the_other_ranks():
    made: list[str] = []
    pieces = pieces_of(tiny_model("llama"))

    def noted(piece: Any) -> Any:
        from dataclasses import replace

        def make(keep: bool) -> Any:
            made.append(f"{piece.names[0]} {keep}")
            return piece.make(keep)

        return replace(piece, make=make)

    source = sync.PieceSource(lambda: [noted(piece) for piece in pieces], lambda *given: given, torch.device("cpu"))
    with pytest.raises(EngineError):
        sync._send(source, Transfer(Transfers(fails_at=1), source))
    assert [text.split()[0] for text in made] == [piece.names[0] for piece in pieces]
    assert [text.split()[1] for text in made[:3]] == ["True", "True", "False"]


def test_without_vllm_beside_the_trainer_an_error_says_what_to_do():
    with pytest.raises(ImportError, match=r"pip install.*vllm.*vllm_weight_sync='folder'"):
        sync.transfer_api()


# -- the choice ------------------------------------------------------------------------------------


class OnGpu(torch.nn.Module):
    """Its weights say that they lie on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
        return iter([type("Weight", (), {"device": torch.device("cuda"), "requires_grad": True, "data": weight})()])


@pytest.mark.parametrize(
    ("model", "given", "found"),
    [
        ("cpu", {"urls": ["u"]}, "folder"),
        ("cpu", {"own_engines": True}, "memory"),
        ("gpu", {"urls": ["u"]}, "nccl"),
        ("gpu", {"own_engines": True, "way": "ipc", "clients": ["one"]}, "ipc"),
        ("gpu", {"own_engines": True, "workers": [2]}, "folder"),
        ("gpu", {"urls": ["u"], "way": "ipc"}, "ipc"),
        ("gpu", {"urls": ["u"], "way": "folder"}, "folder"),
    ],
    ids=str,
)
def test_which_way_whole_weights_go(model, given, found):
    policy = tiny_model("llama") if model == "cpu" else OnGpu()
    way = make_sync(policy, **given)
    known = {FolderSync: "folder", HandSync: "memory"}
    assert (known.get(type(way)) or way.backend) == found


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("nccl", "vllm_weight_sync='nccl': the policy is on cpu.*take 'folder'"),
        ("memory", "vllm_weight_sync='memory': a server is another process"),
        ("rdma", "vllm_weight_sync='rdma': choose among 'auto', 'adapter'"),
        ("adapter", "vllm_weight_sync='adapter': there is no adapter.*leave it 'auto'"),
    ],
)
def test_ways_that_cannot_be_gone(way, said):
    with pytest.raises(ValueError, match=said):
        make_sync(tiny_model("llama"), way)


def test_where_there_is_no_room_the_error_names_a_way_out(monkeypatch):
    monkeypatch.setattr(sync.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match=r"neither /dev/shm nor .* has room for 0.0 GB.*vllm_sync_folder"):
        FolderSync(tiny_model("llama")).push(LoadingEngine(tiny_model("llama")), "run-0")


# -- ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What came of two ranks, which run once."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "way").mkdir()
    on_ranks(vllm_ranks.work, 2, str(folder / "found"))
    return [torch.load(folder / f"found-{rank}") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_that_hold_parts_give_whole_weights_once(ranks):
    zero, one = ranks
    for name in ("qwen2", "llama"):
        same, apart = zero[name]
        assert same
        assert apart < 1e-6
        assert (zero[f"calls {name} False"], one[f"calls {name} False"]) == (5, 0)  # rank 0 alone tells the engine
    assert zero["dora"] < 2e-6
    assert zero["adapter"] < 2e-6
    assert max(rank["adapter again"] for rank in ranks) < 2e-6
    assert max(rank[way] for rank in ranks for way in ("by hand", "own folder")) < 1e-6
    assert (zero["sent"] < 1e-6, one["sent"]) == (True, 0)
    assert zero["stamp"] == one["stamp"]
    assert zero["left"] == one["left"] == []


@pytest.mark.slow
def test_what_fails_on_one_rank_is_an_error_of_all(ranks):
    zero, one = ranks
    assert zero["refused"].startswith("EngineError: out of memory; it was to load")
    assert one["refused"].startswith("EngineError: rank 0 could not give vLLM the weights: out of memory")
    assert zero["no folder"].startswith(("FileExistsError", "NotADirectoryError"))
    assert one["no folder"].startswith("EngineError: rank 0 could not make a folder for the weights: ")
    assert zero["no room"] == "OSError: No space left on device"
    assert zero["broken"].startswith("EngineError: the transfer of weights to vLLM broke off: RuntimeError: NCCL error")
    assert one["broken"].startswith("EngineError: rank 0 could not send the weights to vLLM: the transfer")
    assert zero["version"] == "run-1-unfinished"
    wrong = "vLLM does not sample by the policy's weights: th"
    assert zero["checks"] == ["right", wrong, "gone"]
    assert one["checks"] == ["right", wrong, "rank 0 could not ask vLLM for completions: gone"]
