"""`finetune evaluate --tasks` by the command line: each sample is that of the two harnesses, also after a kill."""

import json
import shutil
from pathlib import Path

import pytest
from reference import (
    HALF_MEMORISED,
    REFERENCE,
    SHARED,
    needs_data,
    needs_reference,
    read_lines,
    read_reference,
)

from finetune.cli.main import main
from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.asking.generation import Generation, Prompt
from finetune.evaluation.sandbox.programs import find_sandbox
from finetune.evaluation.tasks import run_tasks
from finetune.models.opening import open_model

pytestmark = needs_reference
LAMBADA = ("--tasks", "lambada", "--task-data", REFERENCE / "data" / "lambada_like.jsonl")
GSM8K = ("--tasks", "gsm8k", "--task-data", REFERENCE / "data" / "gsm8k_eval.jsonl")
HUMANEVAL = ("--tasks", "humaneval", "--task-data", REFERENCE / "data" / "humaneval_eval.jsonl")
TOLERANCE = 1e-4


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Return a function that evaluates the reference model in an empty folder; it gives exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=HALF_MEMORISED):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(model), *map(str, arguments)])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


def test_lambada_is_that_of_the_harness(call, tmp_path):
    status, out, _ = call(*LAMBADA, "--json")
    assert status == 0
    found = json.loads(out)["tasks"]["lambada"]
    reference = read_reference("harness/half_memorised.json")["tasks"]["lambada"]
    assert found["n"] == 60
    assert found["metric"] == pytest.approx(reference["metric"], rel=1e-5)
    assert found["stderr"]["acc"] == pytest.approx(reference["stderr"]["acc"], rel=1e-6)
    samples = {sample["row"]: sample for sample in read_lines(tmp_path / found["file"])}
    for expected in reference["samples"]:
        sample = samples[expected["row"]]
        assert sample["loglikelihood"] == pytest.approx(expected["loglikelihood"], abs=TOLERANCE)
        for name in ("greedy", "context_tokens", "continuation_tokens"):
            assert sample[name] == expected[name], (expected["row"], name)


def test_odd_passages_are_those_of_the_harness(call, tmp_path):
    rows = read_lines(REFERENCE / "data" / "lambada_edge.jsonl")[:-1]  # the last has 8,499 tokens
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert call("--tasks", "lambada", "--task-data", tmp_path, "-o", "out")[0] == 0
    samples = {sample["row"]: sample for sample in read_lines(Path("out/lambada.jsonl"))}
    for expected in read_reference("harness/half_memorised.json")["tasks"]["lambada_edge"]["samples"][:-1]:
        sample = samples[expected["row"]]
        assert sample["loglikelihood"] == pytest.approx(expected["loglikelihood"], abs=TOLERANCE), expected["case"]
        for name in ("greedy", "context_tokens", "continuation_tokens"):
            assert sample[name] == expected[name], (expected["case"], name)


@needs_data
def test_gsm8k_is_that_of_the_harness(call):
    exemplars = SHARED / "data" / "gsm8k_train.jsonl"
    status, out, _ = call(*GSM8K, "--exemplars", exemplars, "--limit", 3, "-o", "out", "--json")
    assert status == 0
    assert json.loads(out)["tasks"]["gsm8k"]["bits_per_byte"] > 0
    samples = {sample["row"]: sample for sample in read_lines(Path("out/gsm8k.jsonl"))}
    for expected in read_reference("harness/half_memorised.json")["tasks"]["gsm8k"]["samples"][:3]:
        names = ("prompt_tokens", "generated", "strict", "flexible", "strict_correct", "flexible_correct")
        assert {name: samples[expected["row"]][name] for name in names} == {name: expected[name] for name in names}


def test_humaneval_is_that_of_the_harness(call):
    if isinstance(find_sandbox(), str):
        pytest.skip("no sandbox here")
    status, out, _ = call(*HUMANEVAL, "--limit", 6, "-o", "out", "--json")
    assert status == 0
    samples = {sample["task_id"]: sample for sample in read_lines(Path("out/humaneval.jsonl"))}
    expected = read_reference("harness/half_memorised.json")["tasks"]["humaneval"]["samples"][:6]
    for one in expected:
        names = ("prompt_tokens", "generated", "passed")
        assert {name: samples[one["task_id"]][name] for name in names} == {name: one[name] for name in names}
    right = sum(one["passed"] for one in expected) / 6
    assert json.loads(out)["tasks"]["humaneval"]["metric"] == {"pass@1": pytest.approx(right)}


def test_words_and_sums_are_those_of_llmbox(call):
    assert call(*LAMBADA, "--protocol", "authors", "--limit", 20, "-o", "words")[0] == 0
    status, out, _ = call(*GSM8K, "--protocol", "authors", "--limit", 3, "-o", "sums")
    assert status == 0
    assert "no exemplars are named (--exemplars FILE)" in out
    reference = read_reference("authors/half_memorised.json")["tasks"]
    for folder, task, name in (("words", "lambada", "lambada"), ("sums", "gsm8k", "gsm8k_0_shots")):
        for sample in read_lines(Path(folder) / f"{task}.jsonl"):
            expected = reference[name]["samples"][sample["row"]]
            for field in ("generated", "reference", "correct", "prompt_tokens"):
                assert sample[field] == expected[field], (name, sample["row"], field)


@pytest.mark.parametrize("size", [1, 7, 32])
def test_scores_do_not_depend_on_the_batch(call, size):
    assert call(*LAMBADA, "--limit", 32, "--batch-size", size, "-o", "out")[0] == 0
    reference = read_reference("harness/half_memorised.json")["tasks"]["lambada"]["samples"]
    for sample in read_lines(Path("out/lambada.jsonl")):
        expected = reference[sample["row"]]
        assert sample["loglikelihood"] == pytest.approx(expected["loglikelihood"], abs=TOLERANCE)
        assert sample["greedy"] == expected["greedy"]


def test_texts_do_not_depend_on_the_batch_nor_on_being_drawn_beside_others():
    asked = AskedModel(open_model(HALF_MEMORISED))
    rows = read_lines(REFERENCE / "data" / "lambada_like.jsonl")[:4]
    prompts = [Prompt(asked.encode(row["text"][:60]), seed) for row in rows for seed in (1, 2, 3)]
    for settings in (Generation(12), Generation(12, temperature=0.8)):
        found = []
        for size in (1, 5, 12):
            asked.batch_size = size
            texts = dict(asked.generate(prompts, settings))
            found.append([texts[index].text for index in range(len(prompts))])
        assert found[0] == found[1] == found[2]
        assert len(set(found[0])) == (4 if not settings.temperature else len(set(found[0])))
    assert len(set(found[0])) > 4  # drawn at a temperature


def test_a_killed_evaluation_continues_to_the_same_end(call, monkeypatch):
    status, out, _ = call(*LAMBADA, "--limit", 24, "-o", "whole", "--json")
    whole = json.loads(out)
    shutil.copytree("whole", "killed")
    Path("killed/results.json").unlink()
    text = Path("whole/lambada.jsonl").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    Path("killed/lambada.jsonl").write_text("".join(lines[:10]) + lines[10][:30], encoding="utf-8")
    asked = []
    measure = run_tasks.AskedModel.measure
    monkeypatch.setattr(
        run_tasks.AskedModel, "measure", lambda self, pairs: (asked.append(len(pairs)), measure(self, pairs))[1]
    )
    status, out, _ = call(*LAMBADA, "--limit", 24, "-o", "killed", "--json")
    assert (status, asked) == (0, [14])
    again = json.loads(out)
    assert again["tasks"]["lambada"]["metric"] == pytest.approx(whole["tasks"]["lambada"]["metric"], rel=1e-5)
    assert {s["row"] for s in read_lines(Path("killed/lambada.jsonl"))} == set(range(24))
    status, out, err = call(*LAMBADA, "--protocol", "authors", "-o", "killed")
    assert (status, out) == (2, "")
    assert "killed: holds an evaluation with another protocol (harness; now authors)" in err


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


MISTAKES = {
    "task": (["--tasks", "lambda"], "--tasks: 'lambda' is an unknown task; did you mean 'lambada'?"),
    "no task": (["--tasks", ","], "--tasks: names no task; known are lambada, gsm8k, humaneval, mbpp"),
    "file": ([*LAMBADA[:3], "nosuch.jsonl"], "nosuch.jsonl: does not exist"),
    "columns": ([*GSM8K[:3], "rows.jsonl"], "rows.jsonl, line 1: has no text in question, answer; a row of gsm8k has"),
    "exemplars": (
        [*GSM8K, "--exemplars", "rows.jsonl"],
        "rows.jsonl, line 1: has no text in question, answer; an exemplar has",
    ),
    "few": ([*GSM8K, "--exemplars", "few.jsonl"], "few.jsonl: holds 1 exemplars where 5 are needed"),
    "one file": (
        ["--tasks", "lambada,gsm8k", "--task-data", "rows.jsonl"],
        "rows.jsonl: is one file for several tasks",
    ),
    "folder": (["--tasks", "gsm8k", "--task-data", "."], ".: holds no file of gsm8k, such as gsm8k.jsonl"),
    "output": ([*LAMBADA, "-o", "."], ".: exists and holds no evaluation; choose another folder with -o"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(call, name):
    write("rows.jsonl", {"text": "a b"})
    write("few.jsonl", {"question": "1 + 1?", "answer": "2\n#### 2"})
    arguments, message = MISTAKES[name]
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["few.jsonl", "rows.jsonl"]


def test_without_the_hub_the_message_says_what_to_give(call, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    status, out, err = call("--tasks", "gsm8k")
    assert (status, out) == (2, "")
    assert "openai/gsm8k@740312add88f781978c0658806c59bc2815b9866/main/test: " in err
    assert "the network is switched off by HF_HUB_OFFLINE" in err
    assert "--task-data" in err
    assert not list(Path().iterdir())


def test_a_checkpoint_without_tokenizer_is_refused(call, tmp_path):
    shutil.copytree(HALF_MEMORISED, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
    status, out, err = call(*LAMBADA, "-o", "out", model=tmp_path / "model")
    assert (status, out) == (2, "")
    assert "the tokenizer cannot be read" in err
    assert not Path("out").exists()


def test_a_full_disk_is_one_message(call):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    assert call(*LAMBADA, "--limit", 1, "-o", "out")[0] == 0
    Path("out/lambada.jsonl").unlink()
    Path("out/lambada.jsonl").symlink_to("/dev/full")
    status, out, err = call(*LAMBADA, "--limit", 1, "-o", "out")
    assert (status, out) == (2, "")
    assert "lambada.jsonl: cannot be written: the disk is full; the samples before it are kept; the same command" in err


def test_a_chat_model_is_asked_in_its_template(call):
    assert call(*LAMBADA, "--protocol", "authors", "--limit", 1, "--chat", "-o", "chat")[0] == 0
    assert call(*LAMBADA, "--protocol", "authors", "--limit", 1, "-o", "plain")[0] == 0
    chat, plain = (read_lines(Path(name) / "lambada.jsonl")[0] for name in ("chat", "plain"))
    assert chat["prompt"] == plain["prompt"]
    assert chat["prompt_tokens"] > plain["prompt_tokens"]
