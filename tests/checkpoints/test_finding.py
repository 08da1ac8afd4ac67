"""From names to folders: aliases, the hub, the cache."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.checkpoints.finding import as_llama, find_checkpoint, fingerprint_checkpoint
from finetune.errors import CheckpointError, OutputError
from finetune.files.folders import check_output_free, write_folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("before-anealing", "is unknown; did you mean 'before-annealing'?"),
        ("phase26", "is unknown; did you mean 'phase"),
        ("base-4k", "the authors' documents give no link to it; give a local folder instead"),
        ("./missing", "is unknown"),
    ],
)
def test_names_that_stand_for_nothing(name, message):
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(name)
    assert message in str(caught.value)


def test_a_checkpoint_that_a_run_has_not_kept_is_no_name_of_the_hub(tmp_path, monkeypatch):
    """Its name was sent to the hub, which did not know it."""
    monkeypatch.chdir(tmp_path)
    for step in (2, 3):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"run has no checkpoint-1; checkpoints in it: checkpoint-2, checkpoint-3"
    ):
        find_checkpoint("run/checkpoint-1")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("base", ("hf download yulan-team/YuLan-Mini --include", " --local-dir YuLan-Mini\n")),
        ("phase7", ("hf download yulan-team/YuLan-Mini-Phase7 --include", " --local-dir YuLan-Mini-Phase7\n")),
        (
            "phase7@v1",
            ("hf download yulan-team/YuLan-Mini-Phase7 --revision v1 --include", " --local-dir YuLan-Mini-Phase7\n"),
        ),
        ("me/model@v2", ("hf download me/model --revision v2 --include", " --local-dir model\n")),
    ],
)
def test_offline_says_how_to_fetch(own_cache, monkeypatch, tmp_path, name, command):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(name)
    assert all(part in str(caught.value) for part in command)
    assert "the network is switched off by HF_HUB_OFFLINE" in str(caught.value)


def test_a_fold_is_made_once_and_never_mistaken(own_cache, tmp_path, nano):
    shutil.copytree(nano, tmp_path / "start")
    first = as_llama(tmp_path / "start")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert as_llama(tmp_path / "start") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    tensors = load_file(tmp_path / "start" / "model.safetensors")
    before = (tmp_path / "start" / "model.safetensors").stat()
    tensors["model.norm.weight"][0] += 1
    changed = tensors["model.norm.weight"][0] * tensors["model.norm_alpha"]  # a fold multiplies them
    save_file(tensors, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    # Even with its size and times as they were.
    os.utime(tmp_path / "start" / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = as_llama(tmp_path / "start")
    assert second != first
    assert load_file(second / "model.safetensors")["model.norm.weight"][0] == changed


def test_llama_folders_are_used_as_they_are(nano_llama):
    assert as_llama(nano_llama) == nano_llama


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_the_fingerprint_covers_all_that_a_run_depends_on(tmp_path, nano, file):
    shutil.copytree(nano, tmp_path / "copy")
    assert fingerprint_checkpoint(tmp_path / "copy") == fingerprint_checkpoint(nano)
    content = json.loads((tmp_path / "copy" / file).read_text(encoding="utf-8"))
    (tmp_path / "copy" / file).write_text(json.dumps({**content, "extra": 1}), encoding="utf-8")
    assert fingerprint_checkpoint(tmp_path / "copy") != fingerprint_checkpoint(nano)


def fold_and_report(folder, queue):
    queue.put(str(as_llama(folder)))


def test_two_processes_fold_into_one_cache_at_once(own_cache, nano):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=fold_and_report, args=(nano, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(results) == 1
    assert [path.name for path in (own_cache / "folds").iterdir()] == [Path(results.pop()).name]


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_all_or_nothing(tmp_path):
    with write_folder(tmp_path / "deep" / "out") as folder:
        (folder / "part").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "part").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="another process wrote it at the same time"), write_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_link_to_nowhere_is_taken(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is not a folder"):
        check_output_free(tmp_path / "out")


def test_an_output_folder_needs_a_name_of_its_own(tmp_path, monkeypatch):
    # An empty folder that one stands in was a traceback. Over a link, a whole export was made and then could not be renamed.
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for output, message in ((".", "such as mine"), ("..", "such as ../mine"), ("../link", "is a link to the folder")):
        with pytest.raises(OutputError, match=message), write_folder(Path(output)):
            raise AssertionError("nothing is written")
