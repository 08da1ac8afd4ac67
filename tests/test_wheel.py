"""The wheel: built, unpacked into an empty folder, and used there as a person would who has no checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.files.resources import find_demo_data, list_all_recipes, list_templates

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel with this environment's hatchling, so without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel, which Python finds before anything else."""
    folder = tmp_path_factory.mktemp("site")
    run_python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture
def call(site, tmp_path):
    """Return a function that runs the installed kit in an empty folder, outside of the checkout."""

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return run_python("-m", "finetune", *arguments, cwd=tmp_path, env=environment)

    return run


def run_python(*arguments, **options):
    words = [sys.executable, *map(str, arguments)]
    environment = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **options.pop("env", os.environ)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_whole_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "finetune").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "finetune/py.typed" in names
    for folder in ("recipes", "templates"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"finetune/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_it_finds_what_came_with_it(site, tmp_path):
    code = (
        "import json, pathlib, finetune, finetune.files.resources as found\n"
        "launches = [found.find_launch_file(pathlib.Path(name)) for name in ('fsdp2', 'recipes/accelerate/zero3.yaml')]\n"
        "print(json.dumps([finetune.__file__, *map(str, found.list_all_recipes().values()), "
        "*map(str, found.list_templates().values()), *map(str, launches)]))"
    )
    paths = json.loads(run_python("-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}))
    assert all(Path(path).is_relative_to(site / "finetune") for path in paths)
    assert len(paths) == 1 + len(list_all_recipes()) + len(list_templates()) + 2


def test_it_runs_without_a_checkout(call, site, tmp_path):
    rows = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    mine = ("-s", "model.checkpoint=nano", "-s", "data.train=rows.jsonl")
    (metadata,) = site.glob("yulan_finetune-*.dist-info")
    assert call("--version") == f"yulan-finetune {metadata.name.split('-')[1].removesuffix('.dist')}\n"
    assert [row["name"] for row in json.loads(call("recipes", "--json"))] == list(list_all_recipes())
    for name in ("sft_qlora", "tiers/8gb", "recipes/tiers/4gb.yaml"):
        assert json.loads(call("check", name, *mine, "--json"))["ok"]
    launch = (ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8")
    assert call("recipes", "accelerate/fsdp2") == launch
    assert str(site / "finetune" / "recipes" / "data" / "demo.jsonl") in call("recipes", "sft_qlora")
    # The command of the guides, as it stands there.
    done = json.loads(call("train", "sft_qlora", *mine, "-s", "trainer.max_steps=2", "--json"))
    assert done["steps"] == 2
    assert Path(done["run"]) == tmp_path / "runs" / "sft_qlora"
    assert (tmp_path / "runs" / "sft_qlora" / "adapter" / "adapter_config.json").is_file()
