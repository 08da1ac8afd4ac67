"""The version: that of the installed package, else that of the checkout; and the versions of the libraries."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from finetune import compat
from finetune.cli.main import main
from finetune.files.version import list_other_versions, read_version

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_an_installed_version_comes_first(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"yulan-finetune": "9.8.7"}[name])
    assert read_version() == "9.8.7"


def test_a_checkout_reads_its_project_file(monkeypatch):
    def fail(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{read_version()}"' in project


def test_the_next_minor_version_of_a_patched_library_is_not_allowed():
    """transformers 5.24 was allowed, and hands the cache to a model by another name: the native form answered from the last token alone."""
    wanted = {
        one.name: one for one in map(Requirement, tomllib.loads(PROJECT.read_text("utf-8"))["project"]["dependencies"])
    }
    headings = re.findall(r"^# --- (\w+) (\d+)\.(\d+) ", Path(compat.__file__).read_text("utf-8"), re.M)
    assert len(headings) == 7
    for name, major, minor in headings:
        allowed = wanted[name.lower()].specifier
        assert f"{major}.{minor}.0" in allowed and f"{major}.{int(minor) + 1}.0" not in allowed, name


def test_a_version_that_was_not_tried_is_said(monkeypatch, capsys):
    assert list_other_versions() == []
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: {"transformers": "5.24.0"}.get(name) or installed(name))
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["transformers<5.24,>=5.23", "numpy<1", 'ruff==0; extra == "dev"']
    )
    try:
        main(["recipes"])
    except SystemExit as stop:
        assert stop.code == 0
    said = capsys.readouterr().err
    assert said == (
        "transformers 5.24.0 is installed, and the kit was tried with <5.24,>=5.23 only, so its numbers may be wrong; mend it by: "
        "pip install 'transformers<5.24,>=5.23'\n"
    )


def test_a_checkout_that_is_not_installed_says_nothing(monkeypatch):
    def fail(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", fail)
    assert list_other_versions() == []


def test_a_library_that_is_absent_is_left_to_what_imports_it(monkeypatch):
    """Every verb ended in a traceback where one of them was not installed, also those that need none."""
    monkeypatch.setattr(metadata, "requires", lambda name: ["bitsandbytes<0.51,>=0.50"])
    monkeypatch.setattr(metadata, "version", fail_to_find)
    assert list_other_versions() == []


def fail_to_find(name):
    raise metadata.PackageNotFoundError(name)
