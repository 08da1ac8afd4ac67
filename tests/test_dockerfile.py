"""The Dockerfile, as far as it can be checked without Docker: its files, its versions, and the commands of the guide."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "first-fine-tune.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def list_instructions():
    """Return `(instruction, arguments)` of each line, with continued lines joined and comments left out."""
    lines = re.sub(r"\\\n", " ", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in lines.splitlines() if line.strip()]


INSTRUCTIONS = list_instructions()
COPIED = [name for what, rest in INSTRUCTIONS if what == "COPY" for name in rest.split()[:-1]]
RUNS = [rest for what, rest in INSTRUCTIONS if what == "RUN"]


def test_every_instruction_is_one_of_docker():
    known = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {what for what, _ in INSTRUCTIONS} == known and [what for what, _ in INSTRUCTIONS][:2] == ["ARG", "FROM"]


@pytest.mark.parametrize("command", RUNS, ids=range(len(RUNS)))
def test_commands_are_valid_shell(command):
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_what_is_copied_is_all_that_the_wheel_is_built_of(tmp_path):
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    assert not ignored.intersection(COPIED)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "built", "."]
    subprocess.run(command, check=True, cwd=tmp_path)
    (file,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
    assert {"finetune/cli/main.py", "finetune/recipes/demo.yaml", "finetune/watching/board.js"} <= set(names)


def test_the_versions_are_those_of_the_project():
    python = re.search(r"^ARG PYTHON=(\S+)$", TEXT, re.MULTILINE)[1]
    assert PROJECT["project"]["requires-python"] == f">={python}"
    assert (
        len(re.findall(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)) == 1
    )
    installs = [part for run in RUNS for part in re.split(r"&&|;;|\n", run) if "pip install" in part]
    assert len(installs) == 3 and all("--constraint constraints.txt" in one or "--no-deps" in one for one in installs)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "whl/cpu"), ("cuda", "--constraint"), ("rocm", None)])
def test_the_argument_chooses_the_build_of_torch(device, expected, tmp_path):
    """The command runs with a `pip` that only says what it was asked for."""
    shutil.copyfile(ROOT / "constraints.txt", tmp_path / "constraints.txt")
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    (tmp_path / "pip").chmod(0o755)
    (command,) = (run for run in RUNS if "case" in run)
    environment = {"DEVICE": device, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    if expected is None:
        assert done.returncode == 2 and "must be cpu or cuda" in done.stderr
    else:
        assert done.returncode == 0 and expected in done.stdout and done.stdout.rstrip().endswith("torch==2.13.0")


def test_the_container_runs_the_command_of_the_project():
    entry = dict(INSTRUCTIONS)["ENTRYPOINT"]
    assert entry == '["finetune"]' and "finetune" in PROJECT["project"]["scripts"]


def test_the_guide_builds_and_runs_it():
    commands = [shlex.split(line) for line in GUIDE.splitlines() if line.startswith("    docker ")]
    builds = [command for command in commands if command[1] == "build"]
    named = re.findall(r"^#   (docker build .*?)   ", TEXT, re.MULTILINE)
    assert builds == [shlex.split(line) for line in named] and len(builds) == 2
    (run,) = (command for command in commands if command[1] == "run")
    volumes = [volume.rpartition(":")[2] for option, volume in pairwise(run) if option == "--volume"]
    folders = [rest for what, rest in INSTRUCTIONS if what == "WORKDIR"]
    assert volumes == [folders[-1], dict(INSTRUCTIONS)["VOLUME"]]
