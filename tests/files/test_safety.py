"""Manifests, locks and the cache: what is damaged is found, and two processes do not disturb each other."""

import errno
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

from finetune.errors import OutputError
from finetune.files import cache as cache_module
from finetune.files.cache import examine_cache, hash_file, make_once
from finetune.files.folders import write_folder
from finetune.files.safety import manifests
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.files.safety.locks import LOCK_FILE, lock_folder
from finetune.files.safety.manifests import MANIFEST_FILE, find_damage, write_manifest
from finetune.runs.resuming import remove_made_files

# Holds the lock of a folder until its standard input ends.
HOLD = """
import sys
from pathlib import Path
from finetune.files.safety.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(200)))
    (folder / "inner" / "b.bin").write_bytes(b"second")
    write_manifest(folder)
    return folder


def test_a_folder_is_whole_as_it_was_written(sealed):
    assert find_damage(sealed) is None
    (sealed / "later.txt").write_text("what is added later is not the manifest's business")
    assert find_damage(sealed) is None


def test_a_manifest_with_sha256_is_read(sealed):
    """The first manifests hold SHA-256; runs and caches of that time stay whole."""
    content = json.loads((sealed / MANIFEST_FILE).read_text())
    for name, entry in content["files"].items():
        digest = hashlib.sha256((sealed / name).read_bytes()).hexdigest()
        content["files"][name] = {"bytes": entry["bytes"], "sha256": digest}
    (sealed / MANIFEST_FILE).write_text(json.dumps(content))
    forget()
    assert find_damage(sealed) is None
    flip(sealed / "a.bin", 11)
    forget()
    assert find_damage(sealed) == "a.bin has other content than was written"


@pytest.mark.parametrize("change", [lambda entry: entry.popitem(), lambda entry: entry.update(bytes="many")])
def test_a_manifest_without_a_known_hash_is_damaged(sealed, change):
    content = json.loads((sealed / MANIFEST_FILE).read_text())
    change(content["files"]["a.bin"])
    (sealed / MANIFEST_FILE).write_text(json.dumps(content))
    forget()
    assert find_damage(sealed) == "its manifest.json is damaged"


def test_the_hash_of_a_large_file_is_that_of_its_blocks_hashes(tmp_path, monkeypatch):
    monkeypatch.setitem(manifests._HASHES, manifests._WRITTEN, (xxhash.xxh3_128, 1000))
    monkeypatch.setattr(manifests, "_READ_BYTES", 300)
    content = bytes(number % 251 for number in range(2500))
    (tmp_path / "large.bin").write_bytes(content)
    write_manifest(tmp_path)
    blocks = [xxhash.xxh3_128(content[start : start + 1000]).digest() for start in (0, 1000, 2000)]
    expected = {"bytes": 2500, manifests._WRITTEN: xxhash.xxh3_128(b"".join(blocks)).hexdigest()}
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["files"] == {"large.bin": expected}
    for place in (0, 8 * 999 + 7, 8 * 1000, 8 * 2499 + 7):
        forget()
        assert find_damage(tmp_path) is None
        flip(tmp_path / "large.bin", place)
        forget()
        assert find_damage(tmp_path) == "large.bin has other content than was written"
        flip(tmp_path / "large.bin", place)


def forget():
    """Hash folders again, as a new process does."""
    manifests._checked.clear()


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position // 8] ^= 1 << (position % 8)
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it, without a trace in the times


@pytest.mark.parametrize("position", [0, 7, 801, 1599])
def test_one_flipped_bit_is_found(sealed, position):
    flip(sealed / "a.bin", position)
    assert find_damage(sealed) == "a.bin has other content than was written"


def test_what_is_gone_cut_or_without_a_manifest_is_found(sealed):
    manifest = (sealed / MANIFEST_FILE).read_bytes()
    (sealed / "inner" / "b.bin").write_bytes(b"sec")
    assert find_damage(sealed) == "inner/b.bin has 3 bytes where 6 were written"
    (sealed / "inner" / "b.bin").unlink()
    (sealed / MANIFEST_FILE).write_bytes(manifest)
    assert find_damage(sealed) == "inner/b.bin is missing"
    (sealed / MANIFEST_FILE).write_bytes(manifest[:-4])
    assert find_damage(sealed) == "its manifest.json is damaged"
    (sealed / MANIFEST_FILE).write_text(json.dumps({"files": {"../a.bin": {"bytes": 1, "sha256": ""}}}))
    assert find_damage(sealed) == "its manifest.json is damaged"
    (sealed / MANIFEST_FILE).unlink()
    assert find_damage(sealed) == "it has no manifest.json, so it was not written to the end"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_numbers(folder):
    with write_folder(folder) as partial:
        (partial / "numbers.bin").write_bytes(bytes(range(100)))


def test_a_damaged_folder_of_the_cache_is_made_again_and_said(own_cache, caplog):
    """One flipped bit in cached rows was trained on in 14 of 24 cases, one in cached weights in 12 of 12."""
    folder = own_cache / "folds" / "abc"
    assert make_once(folder, make_numbers) == folder
    assert examine_cache() == {str(folder): []}
    forget()  # a folder is hashed once a process
    flip(folder / "numbers.bin", 333)
    assert examine_cache() == {str(folder): ["numbers.bin has other content than was written"]}
    forget()
    with caplog.at_level("WARNING", "finetune"):
        make_once(folder, make_numbers)
    assert "the cache is damaged (numbers.bin has other content than was written); making it again" in caplog.text
    assert (folder / "numbers.bin").read_bytes() == bytes(range(100))
    assert {path.name for path in folder.parent.iterdir()} == {"abc"}


def make_slowly(folder, made):
    def make(target):
        with made.get_lock():
            made.value += 1
        make_numbers(target)

    make_once(folder, make)


def test_of_several_processes_one_makes_a_cached_folder_and_all_use_it(own_cache):
    """All but one of them ended with "another process wrote it at the same time"."""
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    processes = [context.Process(target=make_slowly, args=(own_cache / "rows" / "abc", made)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert made.value == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_gone_without(own_cache):
    own_cache.mkdir()
    own_cache.chmod(0o500)
    assert (make_once(own_cache / "rows" / "abc", make_numbers) / "numbers.bin").is_file()


def test_a_cache_that_cannot_be_written_is_gone_without_and_said_once(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "find_writing_obstacle", lambda folder: "the file system is read-only")
    cache_module._find_temporary_cache.cache_clear()
    with caplog.at_level("WARNING", "finetune"):
        for name in ("abc", "abc", "def"):
            assert (make_once(own_cache / "rows" / name, make_numbers) / "numbers.bin").is_file()
    assert caplog.text.count("the cache cannot be written (the file system is read-only)") == 1
    assert not own_cache.exists()


def test_a_damaged_remembered_hash_is_not_believed(own_cache, tmp_path):
    file = tmp_path / "data.bin"
    file.write_bytes(b"content")
    expected = hash_file(file)
    remembered = next((own_cache / "hashes").iterdir())
    flip(remembered, 2)
    assert hash_file(file) == expected


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=rf"process {other.pid} on .* is using this folder"),
            lock_folder(tmp_path),
        ):
            pass
        other.stdin.close()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path, caplog):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
    with caplog.at_level("WARNING", "finetune"), lock_folder(tmp_path):
        pass
    assert f"taking over the lock of process {other.pid} on" in caplog.text


def test_the_lock_of_another_host_is_left_alone(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "2026-01-01"}))
    with (
        pytest.raises(OutputError, match=r"process 7 on elsewhere .*cannot see whether it still runs.*remove .*\.lock"),
        lock_folder(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK_FILE).is_file()


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_full_disk_takes_the_name_of_the_locks_owner_only(tmp_path, monkeypatch, call):
    """A traceback, where the disk was full when the run began."""

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"os.{call}", fail)
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).read_bytes() == b""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_what_the_disk_refuses_is_one_message(tmp_path, number):
    with (
        pytest.raises(OutputError, match=r"cannot be written: .*; make room"),
        translate_os_errors(tmp_path, "make room"),
    ):
        raise OSError(number, os.strerror(number), "file")


@pytest.mark.parametrize("size", [4, 1 << 22])
def test_libraries_that_hide_the_number_of_an_error_are_understood(tmp_path, size):
    """torch raises no OSError for a full disk, which ended in a traceback; a small file fails in its last block, with another text."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OutputError, match="cannot be written"), translate_os_errors(tmp_path):
        torch.save({"a": torch.zeros(size)}, "/dev/full")


def test_a_folder_that_somebody_removes_is_one_message(tmp_path):
    """A run whose folder was removed or renamed ended in a traceback, out of the removal of what it had written."""
    gone = tmp_path / "run"
    with pytest.raises(OutputError, match="was removed or renamed while it was written to"), translate_os_errors(gone):
        (gone / "metrics.jsonl").write_text("")
    with pytest.raises(FileNotFoundError), translate_os_errors(tmp_path):
        (tmp_path / "gone" / "metrics.jsonl").write_text("")
    remove_made_files(gone)


def test_an_error_of_another_kind_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), translate_os_errors(tmp_path):
        raise RuntimeError("shapes do not fit")
