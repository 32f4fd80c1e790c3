"""Several processes: what accelerate's launcher is told."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_models import tiny_model
from tokenizers_for_tests import word_tokenizer

from trl.cli.main import run
from trl.scripts import launch
from trl.scripts.launch import PROFILES, LaunchArguments, launcher_words, profile_file
from trl.trainer.ranks import first_cause

WORDS = ["sft", "--model", "m"]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No launcher has started this process, and the user has no default config of accelerate."""
    for name in ("LOCAL_RANK", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))


def told(**launched):
    """The launcher's arguments, as the launcher reads them, with what it takes from the profile."""
    arguments = launch_command_parser().parse_args(launcher_words(LaunchArguments(**launched), "trl", WORDS))
    return _validate_launch_command(arguments)[0]


def test_when_processes_are_wanted(monkeypatch):
    assert not LaunchArguments().wanted()
    assert not LaunchArguments(num_processes=1).wanted()
    assert LaunchArguments(num_processes=2).wanted()
    assert LaunchArguments(accelerate_config="ddp").wanted()
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun or accelerate has started this process
    assert not LaunchArguments(num_processes=2).wanted()


def test_a_number_of_processes_is_data_parallelism():
    arguments = told(num_processes=4)
    assert (arguments.num_processes, arguments.multi_gpu, arguments.main_process_port) == (4, True, 0)
    assert (arguments.module, arguments.training_script, arguments.training_script_args) == (True, "trl", WORDS)


@pytest.mark.parametrize(
    ("profile", "attributes"),
    [
        ("ddp", {"multi_gpu": True}),
        ("multi_gpu", {"multi_gpu": True}),
        ("ddp_nodes", {"multi_gpu": True, "main_process_port": 29500}),
        ("fsdp", {"use_fsdp": True, "fsdp_version": 2}),
        ("fsdp2_nodes", {"use_fsdp": True, "fsdp_version": 2, "main_process_port": 29500}),
        ("zero1", {"use_deepspeed": True, "zero_stage": 1}),
        ("zero3_nodes", {"use_deepspeed": True, "zero_stage": 3, "main_process_port": 29500}),
        ("fsdp2", {"use_fsdp": True, "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}),
        ("zero2", {"use_deepspeed": True, "zero_stage": 2}),
        ("zero3", {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_every_profile_is_read_by_accelerate(profile, attributes):
    assert profile_file(profile)[0].parent == PROFILES
    nodes = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    several = nodes if profile.endswith("_nodes") else {}
    arguments = told(num_processes=4, accelerate_config=profile, **several)
    assert {name: getattr(arguments, name) for name in several} == several
    assert {name: getattr(arguments, name) for name in attributes} == attributes
    assert arguments.mixed_precision == "no"


@pytest.mark.parametrize("profile", ["zero1", "zero2", "zero3", "deepspeed_zero3"])
def test_a_profile_that_cannot_run_here_names_what_it_needs(profile, monkeypatch):
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: False)
    with pytest.raises(
        ValueError, match=f"^accelerate_config='{profile[-5:]}': needs DeepSpeed; pip install deepspeed"
    ):
        launch.start(LaunchArguments(accelerate_config=profile), "trl", WORDS)


def test_weights_are_not_shared_out_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    launch.check_profile(LaunchArguments(accelerate_config="fsdp2"))
    assert "holds the whole model, as with ddp" in caplog.text
    launch.check_profile(LaunchArguments(accelerate_config="ddp"))
    launch.check_profile(LaunchArguments(num_processes=2))
    assert len(caplog.records) == 1


def test_a_profile_takes_every_device(monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    assert told(accelerate_config="fsdp2").num_processes == 8
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    assert told(accelerate_config="ddp").num_processes == 1
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    assert told(accelerate_config="single_gpu").num_processes == 1
    assert told(accelerate_config="fsdp2", num_machines=2, machine_rank=0, main_process_ip="x").num_processes == 16


def test_a_profile_that_is_not_meant(monkeypatch):
    with pytest.raises(ValueError, match="accelerate_config='fsdp1': it is not here; take fsdp2, its successor"):
        launch.start(LaunchArguments(accelerate_config="fsdp1"), "trl", WORDS)
    expected = "'ddp_nodes': it is for several machines; say --machine_rank, --main_process_ip too"
    with pytest.raises(ValueError, match=expected):
        launch.check_profile(LaunchArguments(accelerate_config="ddp_nodes", num_machines=2))


def test_restarts_go_to_the_launcher():
    assert told(num_processes=2, max_restarts=3).max_restarts == 3


def test_every_profile_is_tried():
    tried = {"ddp", "ddp_nodes", "fsdp2", "fsdp2_nodes", "zero1", "zero2", "zero3", "zero3_nodes", "one_process"}
    assert tried == {path.stem for path in PROFILES.glob("*.yaml")}


def failure(rank, code=1, **data):
    """A failure as torchrun reports it."""
    message = data.pop("message", "")
    given = {"message": {"message": message, "extraInfo": {"timestamp": "7"}}, **data} if message else {"message": "x"}
    return SimpleNamespace(
        exitcode=code, error_file_data=given, timestamp=7, message=given["message"], signal_name=lambda: "SIGKILL"
    )


def test_the_first_cause_of_many():
    """By the clock of the processes; those that end because of another one come last."""
    secondary = failure(0, message="LostRank: rank 1 failed first: E: why", time=6.9, secondary=True)
    others = {0: secondary, 1: failure(1, message="E: why", time=7.2), 2: failure(2, message="F: late", time=7.4)}
    assert first_cause(others) == (1, "E: why")
    assert first_cause({0: secondary}) == (1, "E: why")
    assert first_cause({0: secondary, 1: failure(1, code=-9)}) == (1, "it was ended by SIGKILL; out of memory?")
    ended, late = failure(1, code=-15), failure(0, message="E: why", time=7.9)
    assert first_cause({1: ended, 0: late}) == (0, "E: why")
    assert first_cause({0: failure(0, code=3)}) == (0, "it ended with exit code 3; its own output says why")


def test_a_file_of_the_user(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 3, "compute_environment": "LOCAL_MACHINE"})
    )
    assert profile_file(str(path)) == (path, False)
    assert told(accelerate_config=str(path)).num_processes == 3
    assert told(accelerate_config=str(path), num_processes=2).num_processes == 2
    with pytest.raises(ValueError, match=r"accelerate_config='zero9': choose one of ddp, .*fsdp2, .*zero2, zero3"):
        profile_file("zero9")


def test_the_default_that_the_user_has_made(tmp_path, monkeypatch):
    path = tmp_path / "default.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\ncompute_environment: LOCAL_MACHINE\n")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    assert "--config_file" not in launcher_words(LaunchArguments(num_processes=2), "trl", WORDS)


def test_several_machines():
    words = launcher_words(
        LaunchArguments(num_processes=16, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", gpu_ids="0,1"),
        "trl", WORDS,
    )  # fmt: skip
    line = " ".join(words)
    assert "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1" in line
    assert "--main_process_port" not in line
    assert "--gpu_ids 0,1" in line


def test_profiles_are_written_for_this_accelerate():
    for path in PROFILES.glob("*.yaml"):
        assert load_config_from_file(str(path)).mixed_precision == "no"


@pytest.fixture
def started(monkeypatch):
    """What would have been started."""
    calls = []
    monkeypatch.setattr(launch, "start", lambda several, module, words: calls.append((several, module, words)) or 0)
    return calls


def test_the_command_starts_itself_with_its_own_words(started):
    words = [
        "sft",
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "d",
        "--num_processes",
        "4",
        "--accelerate-config",
        "zero2",
    ]
    assert run(words) == 0
    assert started == [(LaunchArguments(num_processes=4, accelerate_config="zero2"), "trl", words)]


def test_the_file_can_ask_for_processes(started, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nnum_processes: 4\naccelerate_config: zero2\n")
    assert run(["dpo", "--config", str(path), "--num_processes", "2"]) == 0
    assert started[0][0] == LaunchArguments(num_processes=2, accelerate_config="zero2")


def test_a_typo_is_found_before_anything_is_started(started, capsys):
    assert run(["sft", "--model", "m", "--data", "d", "--num_processes", "4", "--lerning_rate", "1"]) == 2
    assert "did you mean learning_rate" in capsys.readouterr().err
    assert not started


def test_a_started_process_starts_no_others(started, monkeypatch, capsys):
    monkeypatch.setenv(launch.LAUNCHED, "1")
    assert run(["sft", "--model", "m", "--data", "nowhere.jsonl", "--num_processes", "4"]) == 2
    assert "nowhere.jsonl: there is no such file" in capsys.readouterr().err
    assert not started


@pytest.mark.slow
def test_two_processes_on_the_cpu_train_one_model(tmp_path):
    tokenizer = word_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n' * 8)
    words = "sft --model_name_or_path model --dataset_name rows.jsonl --num_processes 2 --max_steps 1 --report_to none"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    line = [sys.executable, "-m", "trl", *words.split(), "--output_dir", "out", "--per_device_train_batch_size", "2"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to out") == 1
    state = (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text()
    assert '"epoch": 0.5' in state  # 2 rows for each of 2 processes, of 8
    line[line.index("rows.jsonl")] = "nowhere.jsonl"
    failed = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2
    assert re.match("error: rank [01]: .*nowhere.jsonl: there is no such file", failed.stderr.splitlines()[-1])
