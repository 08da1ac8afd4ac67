"""The stand-in hub, and this process turned to it, with caches of its own."""

import time

import datasets
import huggingface_hub
import pytest
from stand_in import StandIn

from finetune.hub import commits


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback that the library asks in place of the real one; nothing is fetched yet, and no name is known."""
    stand_in = StandIn()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", True
    )  # its servers speak another language, which nobody describes
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "own-cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(commits, "_known", {})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", stand_in.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    yield stand_in
    stand_in.close()


@pytest.fixture
def no_waiting(monkeypatch):
    """Let every wait before another try end at once; returns the seconds that were asked for."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
