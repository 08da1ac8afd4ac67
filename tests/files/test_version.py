"""The version: that of the installed package, else that of the checkout."""

from importlib import metadata
from pathlib import Path

from finetune.files.version import read_version


def test_an_installed_version_comes_first(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"yulan-finetune": "9.8.7"}[name])
    assert read_version() == "9.8.7"


def test_a_checkout_reads_its_project_file(monkeypatch):
    def fail(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{read_version()}"' in project
