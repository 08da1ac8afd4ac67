"""What a killed process was writing under hidden names does not stop the next one; a user's file does."""

import pytest

from finetune.errors import OutputError
from finetune.files.safety.locks import LOCK_FILE
from finetune.runs.resuming import hold_output, remove_made_files


@pytest.fixture
def run(tmp_path):
    """A run directory as a kill leaves it that comes before the first file has its name."""
    folder = tmp_path / "run"
    for name in (".adapter.0123abcd.partial", ".adapter.4567abcd.new"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").write_bytes(b"half")
    for name in (".recipe.yaml.partial", ".run.json.partial"):
        (folder / name).write_text("half", encoding="utf-8")
    return folder


def test_a_run_begins_where_a_killed_one_left_half_files(run):
    """A stage of a chain that was killed there could neither be resumed nor begun: 10 of 593 kills."""
    with hold_output(run, "run", resume=False):
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    assert not run.exists() or not list(run.iterdir())


def test_the_files_of_a_user_stay(run):
    (run / ".notes.partial").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="is not empty"), hold_output(run, "run", resume=False):
        pass
    assert [path.name for path in run.iterdir()] == [".notes.partial"]


def test_a_stage_that_begins_anew_leaves_nothing(run):
    remove_made_files(run)
    assert not run.exists()
