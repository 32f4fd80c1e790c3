"""The files of docs/scale.md are what they are meant to be: its programs run, bash and YAML read the others."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from trl.cli.training import field_docs
from trl.scripts.launch import OTHER_NAMES, PROFILES, LaunchArguments
from trl.scripts.training import JOBS, JobParser

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def blocks(kind):
    return [text for found, text in BLOCKS if found == kind]


def test_programs_run(capsys):
    for block in blocks("python"):
        exec(compile(block, "scale", "exec"), {})
    assert capsys.readouterr().out == "21 GiB\n"


@pytest.mark.parametrize("block", blocks("bash"))
def test_bash_reads_its_files(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_job_of_kubernetes():
    (block,) = blocks("yaml")
    service, job = yaml.safe_load_all(block)
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] == service["spec"]["selector"]["job-name"]
    assert job["metadata"]["name"] == "sft"
    volumes = {each["name"] for each in pod["volumes"]}
    assert volumes == {each["name"] for each in pod["containers"][0]["volumeMounts"]}
    subprocess.run(["bash", "-n"], input=pod["containers"][0]["args"][0], text=True, check=True)


def test_the_command_takes_the_settings():
    lines = [text.replace("\\\n", " ") for text in [*blocks("bash"), *blocks("yaml")] if "-m trl sft" in text]
    assert len(lines) == 3
    for line in lines:
        words = re.search(r"-m trl sft (.*?)(\n'|\n +resources:|\n*$)", line, re.DOTALL)[1].split()
        given = JobParser(JOBS["sft"]).settings_of_words(words)
        assert given["output_dir"] == "/shared/sft"
        assert given["fsdp"] is True
        assert JobParser(JOBS["sft"]).settings_of_file({"fsdp": True}) == {"fsdp": True}


def test_profiles_and_their_names_are_on_the_page():
    for name in [*(path.stem for path in PROFILES.glob("*.yaml")), "single_gpu", "multi_gpu"]:
        assert f"`{name}`" in PAGE
    assert {"single_gpu", "multi_gpu"} <= set(OTHER_NAMES)
    assert "max_restarts" in field_docs(LaunchArguments)
