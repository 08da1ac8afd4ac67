"""`finetune dynamics` with checkpoints of the hub: what is fetched, and what is removed again."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.cli.main import main
from finetune.pipeline.dynamics import run_dynamics as dynamics

NAMES = ("yulan-team/YuLan-Mini-Phase5", "yulan-team/YuLan-Mini-Phase10", "me/later@old")
ALIASES = ("phase5", "phase10", "me/later@old")


@pytest.fixture
def checkpoints(hub, nano, tmp_path, monkeypatch):
    """Three repositories with nano; a file of passages."""
    monkeypatch.chdir(tmp_path)
    config = (nano / "config.json").read_bytes()
    for number, name in enumerate(NAMES):
        changed = config.rstrip()[:-1] + f', "number": {number}}}\n'.encode()
        hub.add_folder(name.partition("@")[0], nano, **{"config.json": changed})
    hub.repositories[("models", "me/later")].refs["old"] = hub.repositories[("models", "me/later")].refs["main"]
    Path("lambada.jsonl").write_text('{"text": "Anna walked home."}\n' * 3)
    return hub


def list_weights():
    """Return the names of the repositories with weights in the hub's cache, and the number of folds."""
    cache, folds = Path(huggingface_hub.constants.HF_HUB_CACHE), Path("own-cache/folds")
    found = {path.relative_to(cache).parts[0] for path in cache.rglob("*.safetensors") if path.exists()}
    return sorted(found), sorted(path.name for path in folds.iterdir() if path.is_dir()) if folds.is_dir() else []


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["dynamics", *ALIASES, "--tasks", "lambada", "--task-data", "lambada.jsonl", *arguments, "--json"])
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    return json.loads(output.out), output.err


def test_one_checkpoint_is_on_the_disk_at_a_time(checkpoints, capsys, monkeypatch):
    """What was here before stays, also after a stop between the download and its removal."""
    as_llama(find_checkpoint("phase10"))
    before = list_weights()
    assert (len(before[0]), len(before[1])) == (1, 1)
    seen = []
    ask = dynamics.ask_tasks
    monkeypatch.setattr(dynamics, "ask_tasks", lambda *given: (seen.append(list_weights()), ask(*given))[1])
    found, err = call(capsys, "--keep", "none", "-o", "out")
    # The tests' nano has tables of its own size: phase10 is here all the time, and at most one other beside it.
    assert [len(weights) for weights, _ in seen] == [2, 1, 2]
    assert [len(folds) for _, folds in seen] == [2, 1, 2]
    assert list_weights() == before
    assert err.count("removed its download") == err.count("removed its fold") == 2
    first = found["checkpoints"][0]
    assert first["tokens"] == 200e9
    assert first["published"]["lambada"]["acc"]["value"] == 53.85
    assert found["checkpoints"][1]["tests"]["published"]["lambada"]["acc"]["test"] == "two proportions, unpaired"
    assert all(len(entry["commit"]) == 40 for entry in found["checkpoints"])
    # All is measured: nothing is fetched.
    checkpoints.forget()
    shutil.rmtree("own-cache")
    again, _ = call(capsys, "--keep", "none", "-o", "out")
    assert again == found
    assert checkpoints.list_fetched() == set()


def test_a_stop_before_the_removal_is_made_up_for(checkpoints, capsys, monkeypatch):
    remove = dynamics.remove_brought

    def stop(visit):
        raise KeyboardInterrupt

    monkeypatch.setattr(dynamics, "remove_brought", stop)
    with pytest.raises(SystemExit):
        main(["dynamics", *ALIASES, "--keep", "none", "-o", "out"])
    assert len(list_weights()[0]) == 1
    monkeypatch.setattr(dynamics, "remove_brought", remove)
    with pytest.raises(SystemExit) as ended:
        main(["dynamics", *ALIASES, "--keep", "none", "-o", "out"])
    assert ended.value.code == 0
    assert list_weights() == ([], [])
