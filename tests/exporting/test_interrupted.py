"""An export that is stopped, at whatever moment, leaves nothing or everything, and the next one succeeds."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from finetune.files.folders import write_folder

# One process that has imported everything starts an export in a child of its own, stops it after a random share of the
# time that a whole export takes, and looks at what is left.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from finetune.exporting.merge import export_result
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result

adapter, output, reference = (Path(path) for path in sys.argv[1:4])
number = getattr(signal, sys.argv[4])

def export(folder):
    export_result(open_result(adapter), folder, ExportSettings("auto", "1MB"))

def start(folder):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            export(folder)
        except SystemExit:
            os._exit(143)
        os._exit(0)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

began = time.monotonic()
assert wait(start(reference)) == 0
whole = time.monotonic() - began
names = {path.name: path.stat().st_size for path in reference.iterdir()}
stopped = 0
for moment in range(12):
    child = start(output)
    time.sleep(random.Random(moment).random() * whole)
    os.kill(child, number)
    stopped += wait(child) != 0
    if output.exists():
        found = {path.name: path.stat().st_size for path in output.iterdir()}
        assert found == names, (moment, found)
        for path in output.iterdir():
            path.unlink()
        output.rmdir()
assert stopped >= 2, stopped  # On a busy machine a whole export may be quicker than the first one was.
assert wait(start(output)) == 0
left = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
assert not left, left
"""


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_stopped_export_leaves_no_folder_that_looks_complete(make_adapter, tmp_path, number):
    adapter = make_adapter(tmp_path / "adapter")
    paths = [str(path) for path in (adapter, tmp_path / "outputs" / "export", tmp_path / "reference")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *paths, number], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (
        {name: tensor for path in sorted((folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "reference", tmp_path / "outputs" / "export")
    )
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with write_folder(tmp_path / "out") as outer:
        (outer / "file").write_text("x")
        with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "out"):
            raise ZeroDivisionError
        assert (outer / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
