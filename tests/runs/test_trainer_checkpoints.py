"""Which checkpoints of a run stay, and which one a run may be resumed from, by their steps and not by the clock."""

import json
import os

import pytest

from finetune.errors import OutputError, TrainingError
from finetune.files.safety.disk_errors import translate_damaged_states, translate_os_errors
from finetune.runs.run_files import list_trainer_checkpoints
from finetune.runs.trainer_checkpoints import check_name, remove_checkpoint, remove_older_checkpoints


def make(run, *names):
    for name in names:
        (run / name).mkdir(parents=True)
        state = {"global_step": int(name.rpartition("-")[2]) if name[-1].isdigit() else 0, "max_steps": 9}
        (run / name / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (2, None, ["checkpoint-10", "checkpoint-8"]),
        (1, None, ["checkpoint-10"]),
        (1, "checkpoint-2", ["checkpoint-10", "checkpoint-2"]),
        (3, "checkpoint-2", ["checkpoint-10", "checkpoint-2", "checkpoint-8"]),
        (2, "checkpoint-10", ["checkpoint-10", "checkpoint-8"]),
        (None, None, ["checkpoint-10", "checkpoint-2", "checkpoint-4", "checkpoint-8"]),
    ],
)
def test_the_lowest_steps_go_whatever_the_clock_says(tmp_path, limit, best, left):
    """After a clock went backwards each checkpoint of a resumed run was removed as soon as it was saved, so that a second stop lost
    all of its work; and a copy that a person had made beside the checkpoints was removed as the oldest one."""
    own = ["checkpoint-best", "checkpoint-4-copy", "checkpoints"]
    make(tmp_path, "checkpoint-2", "checkpoint-4", "checkpoint-8", "checkpoint-10", *own)
    for number, name in enumerate((*own, "checkpoint-10", "checkpoint-8", "checkpoint-2", "checkpoint-4")):
        os.utime(tmp_path / name, (10**9 + 1000 * number,) * 2)
    remove_older_checkpoints(tmp_path, limit, best and str(tmp_path / "elsewhere" / best))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left, *own])


def test_only_folders_are_checkpoints(tmp_path):
    """A pipe of such a name was to be removed as a damaged checkpoint, which waited for ever; a file ended the run."""
    make(tmp_path, "checkpoint-2", "elsewhere-7")
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "elsewhere-7")
    (tmp_path / "checkpoint-98").write_text("")
    os.mkfifo(tmp_path / "checkpoint-99")
    assert [path.name for path in list_trainer_checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-2"]
    remove_checkpoint(tmp_path / "checkpoint-7")
    assert [path.name for path in list_trainer_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "elsewhere-7" / "trainer_state.json").is_file()


def test_a_renamed_checkpoint_is_not_continued(tmp_path):
    """The message was about a missing file of another folder; of a copy the run's own checkpoint was continued by luck."""
    make(tmp_path, "checkpoint-4")
    check_name(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-6")
    with pytest.raises(TrainingError, match=r"checkpoint-6: holds step 4, .* give it the name checkpoint-4"):
        check_name(tmp_path / "checkpoint-6")


def test_a_folder_in_place_of_a_log_is_no_fault_of_the_checkpoint(tmp_path):
    """A person was told to remove a whole checkpoint."""
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "optimizer.pt").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").mkdir()
    log = r"a folder has the name of a file \(at .*metrics\.jsonl\)"
    with (
        pytest.raises(OutputError, match=log),
        translate_os_errors(tmp_path, "x"),
        translate_damaged_states(checkpoint),
    ):
        (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"checkpoint-4: the states"), translate_damaged_states(checkpoint):
        (checkpoint / "optimizer.pt").read_text()
