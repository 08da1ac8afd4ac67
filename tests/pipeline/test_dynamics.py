"""`finetune dynamics` by the command line: table, tests, kills, mistakes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.cli.main import main
from finetune.evaluation.tasks.task_results import SampleFile
from finetune.files.safety.locks import lock_folder
from finetune.pipeline.dynamics import run_dynamics as dynamics

WORDS = ["market", "garden", "library", "harbour", "school", "museum"]
TEXTS = [f"Anna walked from the {first} to the {second}." for first in WORDS for second in WORDS]
FILES = {
    "dynamics.json",
    "report.md",
    "scores.csv",
    "scores.png",
    "weights.csv",
    "weights.png",
    "layers.png",
    "checkpoints",
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def phases(nano, tmp_path, monkeypatch):
    """Three checkpoints, `one`, `two` and `three`, each nano with more noise; and a file of passages."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("one", "two", "three")):
        shutil.copytree(nano, name, ignore=shutil.ignore_patterns("manifest.json"))
        tensors = load_file(f"{name}/model.safetensors")
        torch.manual_seed(0)
        changed = {
            key: value * (1 + 0.2 * number * torch.randn(value.shape)).to(value.dtype) for key, value in tensors.items()
        }
        save_file(changed, f"{name}/model.safetensors", metadata={"format": "pt"})
    write_lines(tmp_path / "lambada.jsonl", [{"text": text} for text in TEXTS[:12]])
    return tmp_path


@pytest.fixture
def call(capsys):
    """Return a function that runs the verb; it gives exit status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["dynamics", *map(str, arguments)])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw nothing, which saves seconds."""
    monkeypatch.setattr(dynamics, "draw_growth", lambda growth, folder: [])


TASK = ("--tasks", "lambada", "--task-data", "lambada.jsonl")


def strip(result):
    """Return a result without the name of its folder."""
    return {key: value for key, value in result.items() if key != "output"}


def test_checkpoints_are_put_side_by_side(call, phases):
    status, out, err = call("one", "two", "three", *TASK, "-o", "out", "--json")
    assert (status, "Traceback" in err) == (0, False)
    found = json.loads(out)
    assert {path.name for path in Path("out").iterdir()} == FILES
    assert found.pop("output") == "out"
    assert found == json.loads(Path("out/dynamics.json").read_text(encoding="utf-8"))
    # Two equal comparisons differed in the name of their folder.
    shutil.copytree("out", "again")
    assert call("one", "two", "three", *TASK, "-o", "again")[0] == 0
    for name in ("dynamics.json", "report.md", "scores.csv"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    assert [entry["name"] for entry in found["checkpoints"]] == ["one", "two", "three"]
    samples = []
    for entry in found["checkpoints"]:
        (folder,) = Path("out/checkpoints").glob(f"{entry['name']}-*")
        lines = (folder / "tasks" / "lambada.jsonl").read_text().splitlines()
        samples.append({line["row"]: line for line in map(json.loads, lines)})
        right = sum(line["greedy"] for line in samples[-1].values())
        assert entry["scores"]["lambada"]["acc"]["value"] == pytest.approx(100 * right / 12)
        assert entry["scores"]["lambada"]["acc"]["n"] == 12
        assert (entry["published"], entry["tokens"]) == ({}, None)
    assert found["checkpoints"][0]["tests"]["measured"] == {}
    for before, after, entry in zip(samples, samples[1:], found["checkpoints"][1:], strict=False):
        tests = entry["tests"]["measured"]["lambada"]
        assert tests["acc"]["test"] == "McNemar, exact"
        assert tests["acc"]["gained"] == sum(after[row]["greedy"] > before[row]["greedy"] for row in range(12))
        assert tests["perplexity"]["test"] == "paired bootstrap"
        assert tests["perplexity"]["of"] == "log-likelihood"
        change = sum(after[row]["loglikelihood"] - before[row]["loglikelihood"] for row in range(12)) / 12
        assert tests["perplexity"]["change"] == pytest.approx(change)
    assert any(sentence.startswith("one to three: lambada acc (measured) no real") for sentence in found["sentences"])
    weights = {entry["name"]: entry for entry in found["weights"]["two"]}
    assert 0.9 < weights["model.layers.0.mlp.up_proj.weight"]["cosine"] < 0.99  # 1 / sqrt(1 + 0.2 ** 2) = 0.981
    with Path("out/scores.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["checkpoint"] for row in rows if row["measure"] == "acc"] == ["one", "two", "three"]
    # Another call measures nothing again, and a checkpoint in between is compared with its new neighbours.
    shutil.copytree("two", "between")
    status, out, err = call("one", "between", "two", "three", *TASK, "-o", "out", "--json")
    assert err.count("measured already") == 3
    again = json.loads(out)["checkpoints"]
    assert again[2]["tests"]["measured"]["lambada"]["acc"]["p"] == 1.0
    assert [again[number]["scores"] for number in (0, 2, 3)] == [entry["scores"] for entry in found["checkpoints"]]


def test_a_killed_call_continues_to_the_same_table(call, phases, no_pictures, monkeypatch):
    status, out, _ = call("one", "two", *TASK, "-o", "whole", "--json")
    whole = strip(json.loads(out))
    # One real kill, in the middle of the second checkpoint's samples and of a line.
    code = (
        "import os, signal, sys\n"
        "from finetune.evaluation.tasks.task_results import SampleFile\n"
        "from finetune.cli.main import main\n"
        "add, count = SampleFile.add, 0\n"
        "def kill(self, row, sample):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 17:\n"
        "        with self.file.open('a') as stream: stream.write('{\"row\": 3, \"gree')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, row, sample)\n"
        "SampleFile.add = kill\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "dynamics", "one", "two", *TASK, "-o", "killed"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("killed/dynamics.json").exists()
    asked = []
    add = SampleFile.add
    monkeypatch.setattr(SampleFile, "add", lambda self, row, sample: (asked.append(row), add(self, row, sample)))
    status, out, err = call("one", "two", *TASK, "-o", "killed", "--json")
    assert (status, len(asked)) == (0, 12 * 2 - 16)
    assert "lambada: 4 of 12 samples are there already" in err
    assert_same(strip(json.loads(out)), whole)
    # Stops at other places: at the weights of a checkpoint, before its tasks, before the tables.
    for place, number in (("measure_weights", 2), ("make_folder", 2), ("write_report", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(dynamics, place, stop_at(number, vars(dynamics)[place]))
            call("one", "two", *TASK, "-o", place)
        status, out, _ = call("one", "two", *TASK, "-o", place, "--json")
        assert status == 0
        assert_same(strip(json.loads(out)), whole)


def stop_at(number, real):
    """Return a function that is interrupted at its call of this number."""
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    return stop


def assert_same(found, expected):
    """Compare results; the batches of a resumed call are others, which changes log-likelihoods by 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


def test_a_narrower_call_says_what_its_table_leaves_out(call, phases, no_pictures):
    # The narrower table took the place of the wider one without a word.
    assert call("one", "two", *TASK, "--limit", 1, "-o", "out")[0] == 0
    assert json.loads(Path("out/dynamics.json").read_text(encoding="utf-8"))["notes"] == []
    status, out, _ = call("one", "-o", "out")
    note = "note: the folder also holds results that are not in this table, of the checkpoints two and of the tasks lambada; they are kept"
    assert (status, out.count(note)) == (0, 1)


def test_without_tasks_the_weights_alone_are_compared(call, phases):
    status, out, _ = call("one", "two", "-o", "out")
    assert status == 0
    assert {path.name for path in Path("out").iterdir()} == FILES - {"scores.png"}
    assert Path("out/scores.csv").read_text() == ""
    assert "written: out" in out


def test_the_same_fine_tuning_is_compared(call, make_recipe, phases, no_pictures, monkeypatch, set_clock):
    """Every checkpoint is trained, resumed and evaluated by itself; `--keep none` leaves no weights."""
    write_lines(phases / "web.jsonl", [{"text": text} for text in TEXTS[:3]])
    own = ["--rows", "web.jsonl", "--sft", "recipe.yaml", "-s", "model.speed=auto", "-s", "trainer.max_steps=2"]
    arguments = ["one", "two", *TASK, *own]
    trained = []
    train = dynamics.train_tuning

    def train_once(tuning):
        """Let the clock call a way faster for the first run, and slower for the second."""
        trained.append(tuning.folder.parent.name)
        set_clock(is_faster=len(trained) == 1)
        return train(tuning)

    monkeypatch.setattr(dynamics, "train_tuning", train_once)
    status, out, _ = call(*arguments, "--keep", "none", "-o", "out", "--json")
    assert status == 0
    found = json.loads(out)
    assert [entry["tuned"]["steps"] for entry in found["checkpoints"]] == [2, 2]
    assert [name[:4].strip("-") for name in trained] == ["one", "two"]
    for entry in found["checkpoints"]:
        assert entry["tuned"]["scores"]["lambada"]["acc"]["n"] == 12
        assert len(entry["activity"]["layers"]) == 4
        assert list(entry["activity"]["sources"]) == ["web"]
    assert "model.speed: all fine-tunings train with bfloat16 products, as the first of them chose" in found["notes"]
    assert any(" (tuned) is best from " in sentence for sentence in found["sentences"])
    assert not list(Path("out").glob("checkpoints/*/tuned/run/adapter"))
    assert len(list(Path("out").glob("checkpoints/*/tuned/run/run.json"))) == 2
    # Trained runs are not trained again, although their weights are gone; what a stopped call left is removed.
    left = next(Path("out").glob("checkpoints/one-*/tuned/run")) / "adapter"
    left.mkdir()
    status, out, _ = call(*arguments, "--keep", "none", "-o", "out", "--json")
    assert (status, len(trained), left.exists()) == (0, 2, False)
    assert json.loads(out) == found
    for changed, message in (
        (
            (*arguments[:-1], "trainer.max_steps=3"),
            "tuned: holds the result of another recipe, or of other rows; choose",
        ),
        ((*arguments[:-1], "output=x"), "dynamics sets model.checkpoint and output for each checkpoint; leave it out"),
    ):
        status, _, err = call(*changed, "-o", "out")
        assert (status, message in err) == (2, True), err
    write_lines(phases / "web.jsonl", [{"text": "another text"}])
    status, _, err = call(*arguments, "-o", "out")
    assert (status, "holds the activity on other rows than those of --rows" in err) == (2, True)


MISTAKES = {
    "task": (["one", "--tasks", "lambda"], "--tasks: 'lambda' is an unknown task; did you mean 'lambada'?"),
    "no data": (["one", "--tasks", "lambada"], "346c4/default/test: the network is switched off by HF_HUB_OFFLINE"),
    "checkpoint": (["one", "phse5", *TASK], "'phse5' is unknown; did you mean 'phase5'?"),
    "offline": (["one", "phase5", *TASK], "phase5: the network is switched off by HF_HUB_OFFLINE"),
    "no link": (["one", "base-4k", *TASK], "base-4k: the authors' documents give no link to it"),
    "tokenizer": (["one", "bare", *TASK], "bare: holds no tokenizer (no tokenizer.json and no tokenizer.model)"),
    "damaged": (["one", "short", *TASK], "model.safetensors: has "),
    "twice": (["one", "two", "./one", *TASK], "./one is named twice"),
    "output": (["one", *TASK, "-o", "."], ".: exists and holds no comparison of checkpoints; choose another folder"),
    "no output": (["one", *TASK, "-o", ""], "-o is missing"),
    "rows": (["one", "--rows", "none.jsonl"], "none.jsonl: does not exist"),
    "recipe": (["one", "two", "--sft", "none.yaml"], "none.yaml"),
    "recipe's key": (["one", "--sft", "recipe.yaml", "-s", "trainer.max_step=1"], "did you mean 'max_steps'?"),
    "chat": (["one", *TASK, "--chat"], "--chat and --set are about the recipe of --sft; name one, or leave them out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing(call, phases, make_recipe, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    shutil.copytree("one", "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("one", "short")
    with Path("short/model.safetensors").open("r+b") as stream:
        stream.truncate(1_000_000)
    before = sorted(path.name for path in Path().iterdir())
    arguments, message = MISTAKES[name]
    out = [] if "-o" in arguments else ["-o", "out"]
    if arguments[-2:] == ["-o", ""]:
        arguments = arguments[:-2]
    status, out, err = call(*arguments, *out)
    assert (status, out) == (2, "")
    assert message in err, err
    assert "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_odd_names_break_no_page_and_no_picture(call, phases):
    Path("one").rename("$x^$ ```")
    status, out, _ = call("two", "$x^$ ```", *TASK, "-o", "out")
    assert status == 0
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert text.count("```") == 2
    assert "$x^$ '''" in text and "$x^$ ```" in out


def test_two_calls_for_one_folder_do_not_mix(call, phases, no_pictures):
    """The second one mended the half-written line of the first, before it looked at the lock."""
    assert call("one", *TASK, "-o", "out")[0] == 0
    file = next(Path("out").glob("checkpoints/*/tasks/lambada.jsonl"))
    with file.open("a") as stream:
        stream.write('{"row": 7, "gre')
    text = file.read_text()
    with lock_folder(Path("out")):
        status, _, err = call("one", "two", *TASK, "-o", "out")
    assert status == 2
    assert "is using this folder; wait until it has ended, or choose another output" in err
    assert file.read_text() == text


def test_other_weights_of_the_same_name_are_refused(call, phases, no_pictures):
    assert call("one", "two", *TASK, "-o", "out")[0] == 0
    shutil.rmtree("one")
    shutil.copytree("three", "one")
    Path("out/checkpoints").joinpath(
        next(Path("out/checkpoints").glob("one-*")).name, "weights", "weights.json"
    ).unlink()
    status, _, err = call("one", "two", *TASK, "-o", "out")
    assert status == 2
    assert "holds the results of other weights than one has now; choose another folder with -o, or remove it" in err


def test_a_full_disk_is_one_message(call, phases, no_pictures, monkeypatch):
    def fill(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dynamics, "write_json", fill)
    write_lines(phases / "web.jsonl", [{"text": TEXTS[0]}])
    status, _, err = call("one", "--rows", "web.jsonl", "-o", "out")
    assert status == 2
    assert "cannot be written: the disk is full; what was measured before is kept; the same command continues" in err
    monkeypatch.undo()
    monkeypatch.chdir(phases)
    assert call("one", "--rows", "web.jsonl", "-o", "out")[0] == 0


def test_from_python(phases, no_pictures):
    found = finetune.dynamics(["one", Path("two")], "out", tasks=["lambada"], data="lambada.jsonl", limit=4)
    assert found.names == ("one", "two")
    assert [line.rows for line in found.lines] == [4, 4]
    alone = finetune.evaluate_tasks("one", ["lambada"], data="lambada.jsonl", limit=4, output="alone")
    assert 100 * alone.tasks["lambada"].metric["acc"] == found.lines[0].figures[0].value
