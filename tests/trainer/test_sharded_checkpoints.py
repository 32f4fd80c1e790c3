"""Checkpoints of two ranks with sharded weights, and of one number of processes for another.

The ids (S16, S17) name faults of earlier releases. One group of two ranks runs all cases, one after another.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from conformity import tokenizer
from peft import PeftModel
from process_group import on_ranks
from safetensors.torch import load_file
from sharded_checkpoint_runs import MIDST, STEPS, ppo, run, trainer_of, two_ranks
from sharded_runs import seeded
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from trl import AutoModelForCausalLMWithValueHead
from trl.models.weight_files import check_shards, shard_files
from trl.rollout.experience import Division, Experience, RolloutLoader, RolloutShape, RolloutState, divided_anew
from trl.trainer.checkpoints import (
    MANIFEST,
    Checkpoint,
    derived_random_state,
    numpy_globals,
    random_state_of,
    read_manifest,
    read_state,
    seal,
    verified,
)
from trl.trainer.resharding import (
    DEEPSPEED,
    FULL,
    PLAIN,
    SHARDED,
    Reader,
    _forget_best,
    _random_states,
    by_name,
    by_number,
    check_readable,
)

FORMS = (FULL, SHARDED)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with all runs, what one process found, and what each of two ranks found."""
    root = tmp_path_factory.mktemp("checkpoints")
    one = {f"{kind}-1": run(kind, root / f"{kind}-1") for kind in ("sft", "grpo")}
    one["lora-1"] = run("sft", root / "lora-1", lora=True)
    one["ppo-1"] = ppo(root / "ppo-1", 0, 1)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):  # the last case
        on_ranks(two_ranks, 2, str(root))
    return root, one, [torch.load(root / f"{rank}.pt") for rank in (0, 1)]


def same(found, wanted, exactly=False):
    """The same weights at the end, and the same logs of the steps that both have made."""
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        if exactly:
            assert torch.equal(found["weights"][name], weight), name
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
    assert 0 < len(found["logs"]) <= len(wanted["logs"])
    for mine, theirs in zip(found["logs"], wanted["logs"], strict=False):
        assert mine == (theirs if exactly else pytest.approx(theirs, rel=2e-5, abs=1e-6))


# -- another number of processes -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_processes_go_on_where_one_stopped(runs, kind):
    """Amid an epoch, amid a half-used rollout."""
    _, one, ranks = runs
    for two in ranks:
        same(two[f"{kind}-1-2"], one[f"{kind}-1"])
        assert len(two[f"{kind}-1-2"]["logs"]) == STEPS
    verified(runs[0] / f"{kind}-1-2" / f"checkpoint-{STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_one_process_goes_on_where_two_stopped(runs, kind, tmp_path, caplog):
    root, one, _ = runs
    found = run(kind, tmp_path, resume=root / f"{kind}-2" / f"checkpoint-{MIDST[kind]}")
    same(found, one[f"{kind}-1"])
    assert "was written by 2 processes with whole weights, this run has 1 with whole weights" in caplog.text
    assert ("the half-used rollout of 2 processes is divided anew" in caplog.text) == (kind == "grpo")
    assert [path for path in tmp_path.glob(".*") if path.is_dir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_sharded_weights_go_on_where_whole_ones_stopped(runs, form, kind):
    _, one, ranks = runs
    for two in ranks:
        same(two[f"{kind}-1-{form}"], one[f"{kind}-1"])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_rollouts_on_shards_go_on(runs, form, tmp_path):
    """Amid a rollout: on as many ranks to the last bit, and on one process."""
    root, one, ranks = runs
    for two in ranks:
        same(two[f"grpo-{form}"], one["grpo-1"])
        same(two[f"grpo-again-{form}"], two[f"grpo-{form}"], exactly=True)
        same(two["moving-again"], two["moving"], exactly=True)
    same(run("grpo", tmp_path, resume=root / f"grpo-{form}" / "checkpoint-1"), one["grpo-1"])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_process_reads_what_fsdp_wrote(runs, form, tmp_path):
    """Weights, moments of the optimizer, schedule and place in the data, without FSDP."""
    root, _, ranks = runs
    found = run("sft", tmp_path, resume=root / f"sft-{form}" / "checkpoint-3", model="tied")
    same(found, ranks[0][f"sft-{form}"])
    verified(root / f"sft-{form}" / "checkpoint-3")  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_process_reads_an_adapter_that_fsdp_wrote(runs, form, tmp_path):
    root, one, ranks = runs
    found = run("sft", tmp_path, resume=root / f"lora-{form}" / "checkpoint-3", lora=True)
    same(found, one["lora-1"])
    same(found, ranks[0][f"lora-{form}"])
    verified(root / f"lora-{form}" / "checkpoint-3")


@pytest.mark.slow
def test_fsdp_reads_an_adapter_of_one_process(runs):
    for two in runs[2]:
        same(two["lora-1-2"], runs[1]["lora-1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-2", "ppo-1-2", "ppo-fsdp", "ppo-1-fsdp"])
def test_ppo_goes_on_with_another_number_of_processes_and_on_shards(runs, name, tmp_path):
    """`load_state` of one's own state is exact; of one process's on two, whole or sharded, and back, equal to 1e-5."""
    root, one, ranks = runs
    for two in (each[name] for each in ranks):
        assert two["again"]
        assert two["sharded"] == ("fsdp" in name)
        assert two["kl_coef"] == pytest.approx(one["ppo-1"]["kl_coef"], rel=1e-6)
        assert two["weights"].keys() == one["ppo-1"]["weights"].keys()
        for key, weight in one["ppo-1"]["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-5, msg=key)
    back = ppo(tmp_path, 0, 1, resume=root / name)["weights"]
    if "1" in name:  # saved before anything was learned: a run of its own
        return
    for key, weight in one["ppo-1"]["weights"].items():
        torch.testing.assert_close(back[key], weight, rtol=0, atol=1e-5, msg=key)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(root / name)
    assert len(load_file(root / name / "model.safetensors")) == 23
    assert model.v_head.summary.weight.shape == (1, 32)


def test_another_global_batch_is_an_error_that_says_the_way_out(runs, tmp_path):
    with pytest.raises(
        ValueError, match=r"rows in an optimizer step=2: the checkpoint .* was written with 4; resume"
    ) as e:
        run("sft", tmp_path, resume=runs[0] / "sft-2" / "checkpoint-3", per_device_train_batch_size=2)
    assert (
        "resume with that, with 1 process per_device_train_batch_size x gradient_accumulation_steps = 4, set ignore"
        in str(e.value)
    )


# -- the same number -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_sharded_runs_resume_to_the_last_bit(runs, form):
    """From the checkpoint before the newest, of which a shard is cut off or a file is missing."""
    for two in runs[2]:
        same(two[f"again-{form}"], two[f"sft-{form}"], exactly=True)
        assert len(two[f"again-{form}"]["logs"]) == STEPS
    kept = sorted(path.name for path in (runs[0] / f"again-{form}").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    for name in kept[1:]:
        verified(runs[0] / f"again-{form}" / name)


@pytest.mark.slow
def test_other_cases_resume_to_the_last_bit(runs):
    """DPO with moments of rewards; FULL_STATE_DICT from a checkpoint of SHARDED_STATE_DICT."""
    for two in runs[2]:
        same(two["dpo-2-again"], two["dpo-2"], exactly=True)
        same(two["other-form"], two[f"sft-{SHARDED}"], exactly=True)


@pytest.mark.slow
def test_the_manifest_lists_the_shards_of_all_ranks(runs):
    root = runs[0]
    files = read_manifest(root / f"sft-{SHARDED}" / "checkpoint-5")["files"]
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert {f"{folder}/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")} <= set(files)
    assert {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json", "config.json"} <= set(files)
    assert {"pytorch_model_fsdp.bin", "optimizer.bin"} <= set(
        read_manifest(root / f"sft-{FULL}" / "checkpoint-5")["files"]
    )
    assert sorted(path.name for path in (root / f"sft-{FULL}").glob("checkpoint-*")) == [
        f"checkpoint-{number}" for number in (2, 3, 4, 5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["cut", "bit", "gone", "metadata"])
def test_a_spoilt_shard_is_named(runs, spoil, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs[0] / f"sft-{SHARDED}" / "checkpoint-3", folder)
    name = "pytorch_model_fsdp_0/.metadata" if spoil == "metadata" else "optimizer_0/__1_0.distcp"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content[:-3] if spoil == "cut" else content)
    if spoil == "gone":
        (folder / name).unlink()
    with pytest.raises(ValueError, match=f"not whole: .*{name}"):
        verified(folder)


@pytest.mark.slow
def test_a_kill_in_the_midst_leaves_the_last_whole_one(runs, caplog, tmp_path):
    root, _, ranks = runs
    assert not (root / "killed" / "checkpoint-2" / MANIFEST).exists()
    assert (root / "killed" / "checkpoint-2" / "optimizer_0" / ".metadata").exists()
    verified(root / "killed" / "checkpoint-1")
    found = run("sft", root / "killed", resume=True)
    assert "checkpoint-2 is not whole: it has no manifest.json" in caplog.text
    same(found, ranks[0]["sft-2"])


@pytest.mark.slow
def test_a_signal_ends_all_ranks_after_a_saved_step(runs):
    assert [two["term"] for two in runs[2]] == [(143, 2), (143, 2)]
    verified(runs[0] / "term" / "checkpoint-2")


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(runs):
    for losses, best, at_end in (two["best"] for two in runs[2]):
        step = losses.index(max(losses)) + 1
        assert best.endswith(f"checkpoint-{step}")
        assert step < 3  # by the worst loss, so that it is not the last one
        assert at_end == pytest.approx(max(losses), abs=1e-7)


@pytest.mark.slow
def test_checkpoints_of_the_model_alone(runs):
    """Optimizer and schedule start anew, the place in the data does not."""
    for two in runs[2]:
        assert [row["learning_rate"] for row in two["only-again"]["logs"]] == [0.5, 0.25, 0.5]
    files = read_manifest(runs[0] / "only" / "checkpoint-2")["files"]
    assert "model.safetensors" in files
    assert not [name for name in files if "optimizer" in name or "fsdp" in name]


@pytest.mark.slow
def test_what_goes_to_the_hub_of_a_checkpoint_of_shards(runs):
    first, second = (two["pushed"] for two in runs[2])
    assert second == []
    [(name, files)] = first
    assert name == "checkpoint-1"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert not [file for file in files if "fsdp" in file or "rng" in file or "optimizer" in file]


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_final_model_is_whole_and_tied_weights_are_saved_once(runs, form):
    """S16, S17: with SHARDED_STATE_DICT nothing was written, and with the other the head twice."""
    root, _, ranks = runs
    folder = root / f"model-{form}"
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 20
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.architectures == ["LlamaForCausalLM"]
    weights = ranks[0][f"sft-{form}"]["weights"]
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert len(type(tokenizer()).from_pretrained(folder)) == len(tokenizer())
    assert not list(folder.glob(".*"))
    assert [two[f"sft-{form}"]["gathered"] for two in ranks] == [21, 0]  # in the memory of the first one only


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_final_adapter_is_readable(runs, form):
    root, _, ranks = runs
    model = PeftModel.from_pretrained(seeded("plain"), root / f"adapter-{form}")
    weights = ranks[0][f"lora-{form}"]["weights"]
    adapter = {name: weight for name, weight in model.named_parameters() if "lora" in name}
    assert len(adapter) == 8
    assert all(torch.equal(weight, weights[name]) for name, weight in adapter.items())


# -- hostile files -------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["metadata", "bytes"])
def test_nothing_in_a_sharded_checkpoint_can_run_code(runs, place, tmp_path):
    """torch would unpickle what is not a tensor: under a manifest that fits, it does not go off."""
    folder, mark = tmp_path / "checkpoint-3", tmp_path / "exploded"
    shutil.copytree(runs[0] / f"sft-{SHARDED}" / "checkpoint-3", folder)
    shards = folder / "optimizer_0"
    if place == "metadata":
        (shards / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), shards / "bomb.distcp")
        found = pickle.loads((shards / ".metadata").read_bytes())
        index = next(key for key in found.storage_data if key.fqn.endswith("lr"))
        size = (shards / "bomb.distcp").stat().st_size
        found.storage_data[index] = type(found.storage_data[index])("bomb.distcp", 0, size)
        (shards / ".metadata").write_bytes(pickle.dumps(found))
    trainer = trainer_of("sft", tmp_path / "run", model="tied")
    seal(folder, trainer.describe_run(), step=3, world_size=2)
    with pytest.raises(ValueError, match=r"could not read .*optimizer_0"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not mark.exists()


def test_what_a_metadata_file_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"\.metadata is missing"):
        shard_files(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"could not read .*\.metadata"):
        check_shards(tmp_path)


# -- by hand -------------------------------------------------------------------------------------


def rollout(numbers):
    rows = [torch.tensor([number]) for number in numbers]
    mask_BT = torch.ones(len(rows), 1)
    return Experience(prompts=rows, completions=rows, mask_BT=mask_BT, advantages_BT=torch.tensor(numbers)[:, None])


def plain_state(shape, numbers, cursor):
    loader = RolloutLoader(None, None, shape, None)
    loader.state = RolloutState(position=20, rollouts=3, cursor=cursor, experience=rollout(numbers))
    return loader.plain_state()


def rows_of(plain):
    return plain["experience"]["advantages_BT"].flatten().tolist()


def test_a_half_used_rollout_is_divided_anew():
    """Two ranks took rows 0-1 and 2-3 in the first optimizer step, 4-5 and 6-7 in the second; three steps are made."""
    of_two, of_one = RolloutShape(1, 2, 2, 4), RolloutShape(4, 2, 2, 2)
    ranks = [plain_state(of_two, [0, 1, 4, 5], 6), plain_state(of_two, [2, 3, 6, 7], 6)]
    made, own = Division(of_two, 2, 2), Division(of_one, 1, 1)
    plain, said = divided_anew(ranks, made, own, rank=0)
    assert (rows_of(plain), plain["cursor"], plain["position"], plain["rollouts"]) == ([*range(8)], 3, 20, 3)
    assert said == "is divided anew"
    loader = RolloutLoader(None, lambda rows: rows.advantages_BT.flatten().tolist(), of_one, None)
    loader.restore(plain)
    assert next(iter(loader)) == [4, 5, 6, 7]
    for rank in (0, 1):
        back, _ = divided_anew([plain], own, made, rank)
        assert rows_of(back) == rows_of(ranks[rank])
        assert back["cursor"] == 6


@pytest.mark.parametrize(
    ("known", "position", "what"), [(True, 18, "2 of its prompts"), (False, 20, "do not come again")]
)
def test_a_rollout_that_cannot_be_divided_is_dropped(known, position, what):
    """Optimizer steps of 8 rows instead of 4: the prompts of the second step of the rollout are drawn again."""
    of_two, of_one = RolloutShape(2, 2, 1, 2), RolloutShape(8, 2, 1, 1)
    ranks = [plain_state(of_two, [0, 1, 4, 5], 1), plain_state(of_two, [2, 3, 6, 7], 1)]
    plain, said = divided_anew(ranks, Division(of_two, 1, 2), Division(of_one, 1, 1), 0, known)
    assert said.startswith("is dropped: ")
    assert what in said
    loader = RolloutLoader(None, None, of_one, None)
    loader.restore(plain)
    assert loader.is_used_up
    assert (loader.state.position, loader.state.rollouts) == (position, 3)


def test_a_used_up_rollout_needs_no_word():
    of_two, of_one = RolloutShape(2, 2, 1, 2), RolloutShape(8, 2, 1, 1)
    ranks = [plain_state(of_two, [0, 1, 4, 5], 2)] * 2
    plain, said = divided_anew(ranks, Division(of_two, 1, 2), Division(of_one, 1, 1), 0)
    assert (plain["experience"], plain["position"], said) == (None, 20, "")


def test_random_states_of_new_processes_come_from_the_seed(tmp_path, caplog):
    one, again = (derived_random_state(3, "checkpoint-7", 1) for _ in range(2))
    others = [
        derived_random_state(*of) for of in ((4, "checkpoint-7", 1), (3, "checkpoint-8", 1), (3, "checkpoint-7", 2))
    ]
    assert torch.equal(one["torch"], again["torch"])
    assert one["python"] == again["python"]
    assert not any(torch.equal(one["torch"], other["torch"]) for other in others)
    checkpoint = Checkpoint(tmp_path / "checkpoint-7", {"world_size": 2, "files": {}})
    assert torch.equal(random_state_of(checkpoint, 2, 3)["torch"], others[2]["torch"])
    with pytest.raises(ValueError, match=r"rng_state-1\.pt is missing"):
        random_state_of(checkpoint, 1, 3)


def test_random_states_of_devices_are_kept_in_both_forms(tmp_path, monkeypatch):
    """Transformers keeps one state in a run of one process, and those of all devices in one of several."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    states = [
        {"python": (rank,), "numpy": ("MT19937",), "cpu": torch.rand(3), "cuda": [torch.tensor(rank)] * 2}
        for rank in (0, 1)
    ]
    for rank, state in enumerate(states):
        torch.save(state, tmp_path / f"rng_state_{rank}.pth")
    of_two, of_one = (Checkpoint(tmp_path, {"world_size": world, "files": {}}) for world in (2, 1))
    _random_states(of_two, tmp_path, Reader(PLAIN, 1, 0, None, None))
    assert torch.load(tmp_path / "rng_state.pth")["cuda"] == torch.tensor(0)
    (tmp_path / "several").mkdir()
    _random_states(of_one, tmp_path / "several", Reader(PLAIN, 3, 0, None, None))
    first = torch.load(tmp_path / "several" / "rng_state_0.pth")
    assert first["cuda"] == [torch.tensor(0)] * 2
    assert torch.equal(first["cpu"], states[0]["cpu"])
    new = [read_state(tmp_path / "several" / f"rng_state_{rank}.pth", allowed=numpy_globals()) for rank in (1, 2)]
    assert not torch.equal(*(state["cpu"] for state in new))
    torch.set_rng_state(new[0]["cpu"])


def test_an_order_by_length_depends_on_the_rows_of_a_process():
    from trl import SFTConfig

    config = SFTConfig("x", per_device_train_batch_size=2, train_sampling_strategy="group_by_length", use_cpu=True)
    assert config.place_in_data() == {"rows in an optimizer step": 2, "rows in an optimizer step on each process": 2}
    assert SFTConfig("x", per_device_train_batch_size=2, use_cpu=True).place_in_data() == {
        "rows in an optimizer step": 2
    }


def test_shards_of_deepspeed_belong_to_their_ranks(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"world_size": 2, "files": {"latest": {}, "zero_to_fp32.py": {}}})
    check_readable(checkpoint, DEEPSPEED, 2)
    for form, world in ((DEEPSPEED, 1), (PLAIN, 2)):
        with pytest.raises(ValueError, match="holds DeepSpeed's shards of 2 processes, this run has"):
            check_readable(checkpoint, form, world)


def test_an_optimizer_by_name_and_by_number(tmp_path):
    names = [["a", "b"], ["c"]]
    numbered = {
        "state": {0: {"step": 1}, 2: {"step": 3}},
        "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}],
    }
    named = by_name(numbered, names, tmp_path)
    assert named["state"] == {"a": {"step": 1}, "c": {"step": 3}}
    assert named["param_groups"][0] == {"lr": 0.1, "params": ["a", "b"]}
    assert by_number(named, names, tmp_path) == numbered
    turned = by_number(named, [["b", "a"], ["c"]], tmp_path)
    assert turned["state"] == {1: {"step": 1}, 2: {"step": 3}}
    for wrong in ([["a", "x"], ["c"]], [["a"], ["b", "c"]]):
        with pytest.raises(ValueError, match=r"groups of .* weights, this run's of .*resume with the same trained"):
            by_number(named, wrong, tmp_path)
    with pytest.raises(ValueError, match="groups of"):
        by_name(numbered, [["a"], ["b", "c"]], tmp_path)


def test_a_best_checkpoint_of_another_form_is_forgotten(tmp_path, caplog):
    file = tmp_path / "trainer_state.json"
    file.write_text(
        json.dumps({"best_model_checkpoint": "there", "best_metric": 1.0, "best_global_step": 2, "epoch": 1})
    )
    os.link(file, tmp_path / "original")
    before = file.read_text()
    _forget_best(file)
    assert (tmp_path / "original").read_text() == before
    assert json.loads(file.read_text()) == {
        "best_model_checkpoint": None, "best_metric": None, "best_global_step": None, "epoch": 1,
    }  # fmt: skip
    assert "there, the best checkpoint so far" in caplog.text
