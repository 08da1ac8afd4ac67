"""The user's path with a base on the hub: train, resume, evaluate, export; what was fetched, and what is recorded."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from finetune.checkpoints.finding import find_checkpoint
from finetune.errors import CheckpointError
from finetune.evaluation.token_loss import evaluate_path
from finetune.exporting.merge import export_result
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

NEEDED = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
OTHER_FORMS = {
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "pytorch_model.bin": b"x",
    "modeling_yulanmini.py": b"raise SystemExit",
}


def test_a_run_goes_on_when_its_base_has_moved_or_the_hub_is_gone(hub, nano, train, tmp_path):
    """Issue 19, B10: the commit was recorded nowhere, so a run could neither be resumed nor exported."""
    first = hub.add_folder("yulan-team/YuLan-Mini-Phase20", nano, **OTHER_FORMS)
    settings = ("model.checkpoint=phase20", "trainer.save_strategy=steps", "trainer.save_steps=2")
    run = train("run", *settings)
    assert hub.list_fetched() == NEEDED
    record = json.loads((run / "run.json").read_text())
    place = {"kind": "model", "repository": "yulan-team/YuLan-Mini-Phase20", "revision": None}
    assert record["hub"] == [{**place, "commit": first}]
    assert open_result(run).lineage.commit == first
    # The branch moves to other weights, and this machine has lost all that it had fetched and folded.
    weights = (nano / "model.safetensors").read_bytes()
    hub.add_folder("yulan-team/YuLan-Mini-Phase20", nano, **{"model.safetensors": weights[:-4] + b"\0\0\0\0"})
    forget_all(hub, tmp_path)
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    shutil.rmtree(run / "checkpoint-4")
    train("run", *settings, resume=True)
    assert {one.path.split("/resolve/")[1].split("/")[0] for one in hub.log if "/resolve/" in one.path} == {first}
    forget_all(hub, tmp_path)
    report = export_result(open_result(run), tmp_path / "export", ExportSettings(verify=False))
    assert hub.list_fetched() == NEEDED
    exported = json.loads((report.output / "export.json").read_text())
    assert exported["base_commit"] == first
    assert f"phase20 (commit {first})" in (report.output / "README.md").read_text()
    # Without the hub: what is here is enough, by every name.
    forget_all(hub, tmp_path, keeps_files=True)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    loss = evaluate_path(f"phase20@{first}", [tmp_path / "held.jsonl"], 128).loss
    assert loss == evaluate_path(str(nano), [tmp_path / "held.jsonl"], 128).loss
    assert hub.log == []


def forget_all(hub, tmp_path, *, keeps_files=False):
    hub.forget()
    if not keeps_files:
        for name in ("hub-cache", "own-cache"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


def test_a_name_may_have_a_commit(hub, nano):
    first = hub.add("yulan-team/YuLan-Mini-Phase20", read_files(nano))
    second = hub.add_folder("yulan-team/YuLan-Mini-Phase20", nano, **{"README.md": b"new"})
    assert find_checkpoint("phase20").name == second
    assert find_checkpoint(f"phase20@{first}").name == first
    assert find_checkpoint(f"yulan-team/YuLan-Mini-Phase20@{first}").name == first
    with pytest.raises(CheckpointError, match="has no branch, tag or commit 'v9'"):
        find_checkpoint("phase20@v9")
    with pytest.raises(CheckpointError, match="is unknown"):
        find_checkpoint("nano@v1")


def test_what_is_here_costs_one_request_or_none(hub, nano):
    commit = hub.add_folder("someone/nano", nano)
    find_checkpoint("someone/nano")
    before = len(hub.log)
    find_checkpoint("someone/nano")
    assert len(hub.log) == before  # within a process a name is asked for once
    hub.forget()
    find_checkpoint("someone/nano")
    assert [one.path for one in hub.log] == ["/api/models/someone/nano?blobs=true"]
    hub.forget()
    find_checkpoint(f"someone/nano@{commit}")
    assert hub.log == []


def test_shards_are_those_of_the_index(hub, nano):
    files = read_files(nano)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    old = {"model-00001-of-00003.safetensors": b"x"}
    hub.add("someone/sharded", {**files, **shards, **old, "model.safetensors.index.json": json.dumps(index).encode()})
    find_checkpoint("someone/sharded")
    wanted = (NEEDED - {"model.safetensors"}) | set(shards) | {"model.safetensors.index.json"}
    assert hub.list_fetched() == wanted


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
