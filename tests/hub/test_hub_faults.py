"""Faults between this machine and the hub: each has its own sentence with what to do, or passes unseen."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from stand_in import Fault

from finetune.checkpoints.finding import find_checkpoint
from finetune.data.reading.sources import read_source
from finetune.data.settings import HubDataset, Source
from finetune.errors import CheckpointError, DataError

INFO, WEIGHTS, CONFIG = "/api/models/someone/nano", "model.safetensors", "/resolve/"
EXPIRED = "Invalid credentials in Authorization header"
# A fault by the script of the stand-in, and what the message says.
SENTENCES = {
    "connection closed": (Fault(INFO, "refuse"), "broke off", "run the same command again"),
    "no answer": (Fault(INFO, "hang"), "does not answer", "HF_HUB_DOWNLOAD_TIMEOUT"),
    "no answer for a file": (Fault(CONFIG, "hang"), "does not answer", "check the connection"),
    "no answer for weights": (Fault("/cdn/", "hang", method="GET"), "does not answer", "check the connection"),
    "weights cut off each time": (Fault("/cdn/", "cut", method="GET"), "broke off", "keeps the files that are whole"),
    "token expired": (Fault(INFO, "status", 401, "", EXPIRED), "does not accept your token", "hf auth login"),
    "token too weak": (Fault(INFO, "status", 403), "your token may not do this", "/settings/tokens"),
    "listed file is gone": (Fault(WEIGHTS, "status", 404), "lacks a file that it lists", "someone/nano"),
    "too many requests": (Fault(INFO, "status", 429), "refuses more requests", "wait some minutes"),
    "too many requests for a file": (Fault(WEIGHTS, "status", 429), "refuses more requests", "wait some minutes"),
    "fault of the hub": (Fault(INFO, "status", 500), "(status 500)", "status.huggingface.co"),
    "fault of the hub at a file": (Fault(WEIGHTS, "status", 503), "(status 503)", "try again later"),
    "fault of the storage": (Fault("/cdn/", "status", 502, method="GET"), "(status 502)", "try again later"),
    "disabled": (
        Fault(INFO, "status", 403, "", "Access to this resource is disabled."),
        "the hub has disabled someone/nano",
        "see http",
    ),
    "odd refusal": (Fault(INFO, "status", 418), "refuses the request (status 418", "see http"),
    "a page that asks for a login": (
        Fault(INFO, "status", 200, body=b"<html>Welcome to the hotel</html>"),
        "is no hub",
        "log in to this network",
    ),
    "wrong bytes": (Fault("/cdn/", "wrong", method="GET"), "does not hold what the hub sent", "remove "),
}


@pytest.fixture
def impatient(monkeypatch, no_waiting):
    """Let what does not answer be noticed after a fifth of a second."""
    monkeypatch.setattr("finetune.hub.snapshots.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2)
    return no_waiting


def refuse(name="someone/nano"):
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(name)
    message = str(refused.value)
    assert message.startswith(f"{name}: ")
    return message


@pytest.mark.parametrize("fault", SENTENCES)
def test_each_fault_has_its_own_sentence(hub, nano, impatient, fault):
    hub.add_folder("someone/nano", nano)
    script, *parts = SENTENCES[fault]
    hub.faults = [Fault(**vars(script))]
    message = refuse()
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("match", [INFO, CONFIG, "/cdn/"])
@pytest.mark.parametrize("do", ["refuse", "hang", "cut", "status"])
def test_a_fault_that_passes_costs_a_wait(hub, nano, impatient, match, do):
    hub.add_folder("someone/nano", nano)
    hub.faults = [Fault(match, do, 500, times=1, method="GET")]
    folder = find_checkpoint("someone/nano")
    assert (folder / "model.safetensors").read_bytes() == (nano / "model.safetensors").read_bytes()
    assert impatient or do == "cut"


def test_who_may_read_a_repository(hub, nano, monkeypatch):
    hub.add_folder("someone/gated", nano)
    hub.repositories["models", "someone/gated"].gated = True
    assert "accept it, and log in with `hf auth login`" in refuse("someone/gated")
    hub.add_folder("someone/private", nano)
    hub.repositories["models", "someone/private"].private = True
    assert "the hub has no someone/private, or it is private" in refuse("someone/private")
    assert "the hub has no someone/nothing, or it is private" in refuse("someone/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "your account may not read someone/gated" in refuse("someone/gated")
    for repository in hub.repositories.values():
        repository.tokens = ("hf_other",)
    for name in ("someone/gated", "someone/private"):
        hub.forget()
        assert (find_checkpoint(name) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "the repository is empty"),
        ({".gitattributes": b""}, "the repository is empty"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "only pickled weights (pytorch_model.bin)"),
        ({"config.json": b"{}", "consolidated.safetensors": b"x"}, "it holds no weights"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "it holds an adapter"),
        ({"weights.gguf": b"x", "README.md": b""}, "it holds no config.json"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_anything_is_fetched(hub, files, sentence):
    hub.add("someone/nano", files)
    assert sentence in refuse()
    assert hub.list_fetched() == set()


def test_nobody_listens(hub, nano, monkeypatch, no_waiting):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    message = refuse()
    assert "http://127.0.0.1:1 cannot be reached" in message
    assert "hf download someone/nano --include" in message
    assert no_waiting == [1, 3]


def test_the_network_is_switched_off(hub, nano, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the network is switched off by HF_HUB_OFFLINE" in refuse()


def test_no_room_is_said_before_the_download(hub, nano, monkeypatch):
    hub.add_folder("someone/nano", nano)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 9, 1))
    message = refuse()
    assert "has room for 1 B" in message or "has room for" in message
    assert hub.list_fetched() == set()


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "is full; make room there, or set HF_HOME to a folder on another disk"),
        (errno.EACCES, "cannot be written (permission denied); set HF_HOME to a folder that can be written"),
        (errno.EROFS, "cannot be written (the file system is read-only); set HF_HOME"),
    ],
)
def test_what_the_disk_of_the_cache_refuses(hub, nano, monkeypatch, number, sentence):
    hub.add_folder("someone/nano", nano)

    def fail(*words, **options):
        raise OSError(number, os.strerror(number), "blobs/x.incomplete")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert sentence in refuse()


def test_the_cache_is_a_file(hub, nano, monkeypatch, tmp_path):
    hub.add_folder("someone/nano", nano)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "cannot be written (a part of the path is a file, not a folder)" in refuse()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_the_hubs_cache_is_found(hub, nano, name):
    """Issue 19, A7: a run trained on the damaged weights without a word."""
    hub.add_folder("someone/nano", nano)
    file = find_checkpoint("someone/nano") / name
    blob = file.resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    hub.forget()
    message = refuse()
    assert f"{name}: does not hold what the hub sent" in message
    assert f"remove {blob}, and run the same command again" in message
    blob.unlink()
    assert (find_checkpoint("someone/nano") / name).read_bytes() == (nano / name).read_bytes()


def test_a_hub_that_is_away_is_replaced_by_what_is_here(hub, nano, impatient, caplog):
    commit = hub.add_folder("someone/nano", nano)
    find_checkpoint("someone/nano")
    for fault in (Fault(INFO, "status", 500), Fault(INFO, "hang"), Fault(INFO, "refuse")):
        hub.forget()
        hub.faults = [fault]
        assert find_checkpoint("someone/nano").name == commit
        assert f"Using commit {commit[:12]}, which is on this machine" in caplog.text
    assert impatient == []  # there is no need to try again
    hub.forget()
    hub.faults = [Fault(INFO, "status", 401, "", EXPIRED)]
    assert "does not accept your token" in refuse()


def test_a_part_that_is_here_is_no_checkpoint(hub, nano, monkeypatch, tmp_path):
    hub.add_folder("someone/nano", nano)
    huggingface_hub.hf_hub_download("someone/nano", "config.json")
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the network is switched off by HF_HUB_OFFLINE" in refuse()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("/api/datasets/", "status", 404, "RepoNotFound"), "the hub has no someone/rows, or it is private"),
        (Fault("/api/datasets/", "status", 401, "", EXPIRED), "does not accept your token"),
        (Fault("/api/datasets/", "status", 401, "GatedRepo"), "can be read only by those who accepted its licence"),
    ],
)
def test_a_data_set_that_cannot_be_read(hub, fault, sentence):
    hub.faults = [fault]
    with pytest.raises(DataError) as refused:
        [list(rows) for _, rows in read_source(Source(HubDataset("someone/rows", fault.error or "x")))]
    assert sentence in str(refused.value)


def test_a_data_set_of_a_hub_that_is_away_costs_the_tries_of_the_kit_only(hub, monkeypatch, no_waiting):
    """The library then tried again six times on its own, for 20 seconds, with eleven lines on standard error."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 cannot be reached .* or download its files"):
        [list(rows) for _, rows in read_source(Source(HubDataset("someone/rows", revision="a" * 40)))]
    assert no_waiting == [1, 3]
    assert datasets.config.HF_HUB_OFFLINE is False


ROWS = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("files", "fault", "sentence"),
    [
        ({"train.jsonl": ROWS}, Fault("train.jsonl", "cut", method="GET"), "broke off"),
        ({"train.jsonl": ROWS}, Fault("train.jsonl", "hang"), "does not answer"),
        ({"train.jsonl": ROWS}, Fault("train.jsonl", "status", 500), "(status 500)"),
        ({"train.jsonl": ROWS}, Fault("train.jsonl", "status", 429), "refuses more requests"),
        ({"train.jsonl": ROWS + b'{"prompt": '}, None, "its files cannot be read as rows"),
        ({"README.md": b"nothing yet"}, None, "holds no files of rows"),
        ({"rows.py": b"raise SystemExit"}, None, "without code of its own, which is never run"),
    ],
)
def test_rows_that_do_not_arrive(hub, impatient, files, fault, sentence):
    """Rows that are damaged were a traceback, and a data set without rows was said to need a connection."""
    hub.add("someone/rows", files, kind="datasets")
    hub.faults = [fault] if fault else []
    with pytest.raises(DataError, match=r"^someone/rows/train: ") as refused:
        [list(rows) for _, rows in read_source(Source(HubDataset("someone/rows")))]
    assert sentence in str(refused.value)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("match", [INFO, "/cdn/"])
def test_ctrl_c_ends_a_download_at_once(hub, nano, tmp_path, match):
    hub.add_folder("someone/nano", nano)
    hub.faults = [Fault(match, "hang", method="GET")]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    words = [sys.executable, "-m", "finetune", "fold", "someone/nano", "-o", str(tmp_path / "out")]
    # A shell lets what it starts in the background ignore the signal, and that is inherited.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(match in one.path and one.method == "GET" for one in hub.log):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=9)  # a wait for the hub ends after 10 seconds, and is begun again
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()
