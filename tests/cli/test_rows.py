"""Rows of other tools by the command line: one message that says what to set, and the same command with it set."""

import json

import pytest

from finetune.cli.main import main

RECIPE = """
model: {checkpoint: nano}
data: {train: rows.jsonl, max_tokens: 1024}
adapter: {rank: 2}
trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, disable_tqdm: true}
answers: 0
output: run
"""
Q, A = {"role": "user", "content": "天空是什么颜色？"}, {"role": "assistant", "content": "蓝色。"}
GOOD = json.dumps({"messages": [Q, A]}, ensure_ascii=False)
CASES = {
    "encoding": (GOOD.encode("gb18030"), "set data.encoding", ["data.encoding=gb18030"]),
    "turns": (json.dumps({"messages": [Q, Q, A]}).encode(), "set data.merge_turns: true", ["data.merge_turns=true"]),
    "bad rows": (f"{GOOD}\n{{\n".encode(), "line 2: broken JSON", ["data.bad_rows=drop"]),
    "digits": (
        f'{GOOD}\n{{"id": {"9" * 5000}}}\n'.encode(),
        "line 2: holds a number of more digits",
        ["data.bad_rows=drop"],
    ),
    "columns": (
        b'{"system_prompt": "S: # 1", "question": "Q", "response": "A"}',
        "data.columns: {system: system_prompt, prompt: question, completion: response}",
        ["data.columns={system: system_prompt, prompt: question, completion: response}"],
    ),
    "pairs": (
        b'{"question": "Q", "chosen": "A", "rejected": "B"}',
        "data.columns: {prompt: question}",
        ["data.columns={prompt: question}"],
    ),
}


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, nano_llama):
    """Return a function that runs one verb in a folder with a recipe; it gives exit status, output and error output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


@pytest.mark.parametrize("name", CASES)
def test_what_the_message_says_to_set_is_enough(call, tmp_path, name):
    content, message, settings = CASES[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    for verb in ("preview", "train"):
        status, out, err = call(verb, "recipe.yaml")
        assert (status, out, message in err, "Traceback" in err) == (2, "", True, False)
        assert not (tmp_path / "run").exists()
    given = [part for setting in settings for part in ("-s", setting)]
    status, out, _ = call("preview", "recipe.yaml", *given, "--json")
    assert status == 0
    assert len(json.loads(out)["rows"]) == 1
    status, out, _ = call("check", "recipe.yaml", *given, "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)


def test_a_run_keeps_the_count_of_bad_rows(call, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{{\n{GOOD.replace('天', '地')}\n", encoding="utf-8")
    status, _, err = call("train", "recipe.yaml", "-s", "data.bad_rows=drop")
    assert status == 0
    assert "1 bad row is left out (data.bad_rows: drop): " in err
    data = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    assert data["train"]["rows"] == 2
    assert data["left_out"] == {"bad (data.bad_rows: drop)": 1}


def test_a_text_of_set_keeps_its_signs(call, tmp_path):
    """`#` cut it as a comment of YAML, and `: ` made a section of it."""
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8")
    status, out, _ = call("preview", "recipe.yaml", "-s", "data.system=Rule: answer # in one word", "--json")
    assert status == 0
    assert "Rule: answer # in one word<|eot_id|>" in json.loads(out)["rows"][0]["text"]
