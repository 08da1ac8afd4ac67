"""Inputs that once lost a part of what they hold, from `../shared/cases`: nothing of a row vanishes without a word."""

from pathlib import Path

import pytest
from token_texts import read_text

from finetune.cli.main import main
from finetune.data.dataset import load_splits
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.lint.lint_data import lint_data
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, TemplateError


@pytest.fixture
def cases(shared):
    folder = shared / "cases"
    if not folder.is_dir():
        pytest.skip("the inputs are not there")
    return folder


@pytest.fixture
def load(cases, nano_llama):
    """Return a function that returns the texts of an input's rows, their trained parts, and the notes."""
    tokenizer = load_tokenizer(nano_llama)

    def run(name, encoding="utf-8", max_tokens=4096, **settings):
        settings = DataSettings((Source(cases / name, encoding=encoding),), max_tokens=max_tokens, **settings)
        splits = load_splits(settings, tokenizer, find_template("yulan-mini", tokenizer), 0)
        key = "prompt_ids" if "prompt_ids" in splits.train.column_names else "input_ids"
        texts = [read_text(tokenizer, row[key]) for row in splits.train]
        trained = [tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in splits.train]
        return texts, trained, splits.report.notes

    return run


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("reasoning.jsonl", "message 2 has 'reasoning_content'"),
        ("weight_half.jsonl", "weight of message 2 is 0.5"),
        ("tool_nan.jsonl", "NaN or Infinity"),
        ("bigint.jsonl", "holds a number of more digits than Python reads"),
        ("same_speaker.jsonl", r"message 2 is of the user; .* set data\.merge_turns: true"),
    ],
)
def test_rows_that_are_refused(load, name, fault):
    with pytest.raises(DataError, match=f"line 1.*: .*{fault}"):
        load(f"rows/{name}")


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("lossw.jsonl", "SECOND<|eot_id|>"),
        ("weight0.jsonl", "SECOND<|eot_id|>"),
        (
            "legacy_fc.jsonl",
            'Let me look.\n<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>',
        ),
        (
            "toolargs_struct.parquet",
            '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>Done.<|eot_id|>',
        ),
        (
            "toolargs_saved",
            '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|eot_id|>Done.<|eot_id|>',
        ),
    ],
)
def test_what_is_trained(load, name, trained):
    texts, found, notes = load(f"rows/{name}")
    assert found[0] == trained
    assert notes == ()
    assert not any("null" in text for text in texts)


def test_a_system_line_beside_messages_is_asked(load):
    assert all("system<|end_header_id|>\n\nTOPSYSTEM Always" in text for text in load("rows/top_system.jsonl")[0])


@pytest.mark.parametrize(
    ("name", "left_out", "rows"),
    [("dsdict", "test/data-00000-of-00001.arrow (split test)", 8), ("ipynb", "(hidden)", 8), ("dscache", "cache-", 8)],
)
def test_of_a_folder_only_what_is_to_be_trained(load, name, left_out, rows):
    texts, _, (note,) = load(f"rows/{name}")
    assert (len(texts), left_out in note) == (rows, True)


BLUE = "Blue.<|eot_id|>"


@pytest.mark.parametrize(
    ("name", "asked", "trained", "remark"),
    [
        ("developer.jsonl", ["system<|end_header_id|>\n\nBe brief.<|eot_id|>", "Sky?"], BLUE, ""),
        ("model_role.jsonl", ["\n\na<|eot_id|>"], "b<|eot_id|>", ""),
        ("empty_system.jsonl", ["<s><|start_header_id|>user<|end_header_id|>\n\nSky 0?"], BLUE, ""),
        ("empty_instr.jsonl", ["\n\nWhat is the sea?<|eot_id|>"], "Water.<|eot_id|>", ""),
        ("rows.tsv", ["\n\nHi<|eot_id|>"], "Hello.<|eot_id|>", ""),
        ("rows.ndjson", ["\n\nWhat colour is number 0?<|eot_id|>"], "Number 0 is blue.<|eot_id|>", ""),
        ("bom_crlf.jsonl", ["\n\n天空是什么颜色？<|eot_id|>"], "蓝色。<|eot_id|>", ""),
        ("eval_red.jsonl", ["\n\nWhat colour is number 0?<|eot_id|>"], "zebra quantum vinegar unrelated<|eot_id|>", ""),
        (
            "hermes.jsonl",
            ["tool<|end_header_id|>\n\n<tool_response>\n3 degrees\n</tool_response><|eot_id|>"],
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|eot_id|>'
            "It is 3 degrees.<|eot_id|>",
            "calls of tools are trained as the texts that they are: they stand in no tool_calls (4 rows)",
        ),
        (
            "tool_empty.jsonl",
            ["tool<|end_header_id|>\n\n<|eot_id|>"],
            '<tool_call>{"name": "weather", "arguments": {}}</tool_call><|eot_id|>Done.<|eot_id|>',
            "",
        ),
        ("label_text.jsonl", ["\n\nI love it<|eot_id|>"], "positive<|eot_id|>", "keys not used: label (4 rows)"),
    ],
)
def test_rows_of_other_tools_are_trained(load, name, asked, trained, remark):
    texts, found, notes = load(f"rows/{name}")
    assert [part in texts[0] for part in asked] == [True] * len(asked)
    assert (found[0], list(notes)) == (trained, [remark] if remark else [])


def test_what_a_message_says_to_set_works(load):
    texts, trained, _ = load("rows/same_speaker.jsonl", merge_turns=True)
    assert "user<|end_header_id|>\n\nHi\n\nSky?<|eot_id|>" in texts[0]
    assert trained[0] == BLUE
    with pytest.raises(DataError, match=r"gbk\.csv, line 2: .*'天空？,蓝色。' in gb18030 .* set data\.encoding"):
        load("rows/gbk.csv")
    texts, trained, _ = load("rows/gbk.csv", encoding="gb18030")
    assert ("\n\n天空？<|eot_id|>" in texts[0], trained[0]) == (True, "蓝色。<|eot_id|>")


def test_a_cell_of_140_000_letters_is_read(load):
    """Python's reader of CSV refuses cells above 131,072 letters."""
    _, trained, _ = load("rows/long.csv", max_tokens=200_000)
    assert (len(trained), set(trained[1].removesuffix("<|eot_id|>"))) == (2, {"x"})
    assert len(trained[1]) > 139_000


def test_rows_of_several_formats_are_named_with_their_lines(load):
    with pytest.raises(DataError, match="3 rows cannot be trained") as caught:
        load("rows/mixed.jsonl")
    for line, other in ((2, "alpaca"), (3, "sharegpt"), (4, "prompt_completion")):
        assert f"mixed.jsonl, line {line}: has no 'messages'" in str(caught.value)
        assert f"that is {other}, and the rows of one file must have one format" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nogen", "has no generation prompt"),
        ("mismatch", "between the generation prompt and the trained text stands"),
        ("headin", "trains the header of the answer"),
    ],
)
def test_templates_that_ask_in_another_text_than_they_train(cases, nano_llama, name, fault):
    with pytest.raises(TemplateError, match=fault):
        find_template(str(cases / "rows" / f"tmpl_{name}.jinja"), load_tokenizer(nano_llama))


@pytest.mark.parametrize("name", ["lint_calls.jsonl", "lint_sys.jsonl"])
def test_lint_keeps_rows_that_differ(cases, nano_llama, name):
    tokenizer = load_tokenizer(nano_llama)
    settings = DataSettings((Source(cases / "rows" / name),))
    report = lint_data(settings, tokenizer, find_template("yulan-mini", tokenizer))
    assert report.passed == report.rows > 1


@pytest.mark.parametrize(
    ("name", "columns", "parts"),
    [
        ("orca.jsonl", {"prompt": "question"}, ["You are a careful zoologist.", "How many legs"]),
        ("orca_prompt.jsonl", {}, ["You are a careful zoologist.", "How many legs"]),
        ("history_prompt.jsonl", {}, ["Hello there.", "Hi, what do you want to know?", "How many legs"]),
        ("lf_alpaca_input.json", {}, ["Answer the question.\nHow many legs"]),
    ],
)
def test_all_of_a_pairs_prompt_is_asked(load, name, columns, parts):
    texts, _, notes = load(f"pairs/{name}", shape="pair", columns=columns)
    assert notes == ()
    assert all([part in text for part in parts] == [True] * len(parts) for text in texts)


@pytest.mark.parametrize(
    ("name", "shape", "remarks"),
    [
        (
            "chosen_json_string.jsonl",
            "pair",
            [
                f"{side} holds messages as JSON text, and is read as messages (12 rows)"
                for side in ("chosen", "rejected")
            ],
        ),
        ("hh.jsonl", "pair", ["chosen, rejected: texts with Human: and Assistant: are read as turns (12 rows)"]),
        (
            "hh_prompt.jsonl",
            "pair",
            ["chosen, rejected, prompt: texts with Human: and Assistant: are read as turns (12 rows)"],
        ),
        ("lf_output_list.json", "pair", []),
        ("kto_int.jsonl", "labelled", []),
        ("kto_str.jsonl", "labelled", []),
    ],
)
def test_pairs_and_labels_of_other_tools(load, name, shape, remarks):
    """JSON and transcripts were trained as the texts that they are; the others were refused."""
    texts, trained, notes = load(f"pairs/{name}", shape=shape)
    start = "<s><|start_header_id|>user<|end_header_id|>\n\n"
    end = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert texts == [f"{start}How many legs do {n} spiders have together?{end}" for n in range(1, 13)]
    good = [f"{n} spiders have {8 * n} legs in all.<|eot_id|>" for n in range(1, 13)]
    bad = [f"About {7 * n}, I suppose.<|eot_id|>" for n in range(1, 13)]
    assert trained == (good if shape == "pair" else [(bad, good)[n % 2][n] for n in range(12)])
    assert list(notes) == remarks


def test_a_pair_without_its_question_names_the_key(load):
    with pytest.raises(DataError, match=r"no question before its answers; .* data\.columns: \{prompt: question\}"):
        load("pairs/orca.jsonl", shape="pair")


# What is said of an input that trains only after something was set; the place is the first that is named.
REFUSED = {
    "bigint.jsonl": ("line 1", "write it as text, or leave it out"),
    "reasoning.jsonl": ("line 1", "remove the key, or set data.template to one that renders it"),
    "weight_half.jsonl": ("line 1", "expected true or false, or 1 or 0"),
    "tool_nan.jsonl": ("line 1", "write null, another number or a text"),
    "same_speaker.jsonl": ("line 1", "set data.merge_turns: true"),
    "mixed.jsonl": ("line 2", "put them into another file"),
    "gbk.csv": ("line 2", "set data.encoding"),
    "long.csv": ("line 3", "raise data.max_tokens, or say what to do with them: data.overflow"),
    "orca.jsonl": ("line 1", "data.columns: {prompt: question}"),
    "grpo_vlong.jsonl": ("line 4", "raise data.max_tokens"),
}
METHODS = {"kto": "method: kto", "grpo": "method: grpo\nrewards: {rules: {format: 1.0}}"}


def test_preview_of_every_input_on_the_command_line(cases, nano_llama, tmp_path, capsys):
    """Each is shown, or one message names its line and says what to set: never a traceback, and nothing is refused for another reason."""
    recipe, found = tmp_path / "recipe.yaml", {}
    inputs = [path for folder in ("rows", "pairs") for path in (cases / folder).iterdir() if path.suffix != ".jinja"]
    for path in inputs:
        method = "method: sft" if path.parent.name == "rows" else METHODS.get(path.name[:4].rstrip("5_"), "method: dpo")
        recipe.write_text(
            f"{method}\nmodel: {{checkpoint: nano}}\ndata: {{train: {path}, max_tokens: 2048}}\n", encoding="utf-8"
        )
        with pytest.raises(SystemExit) as stopped:
            main(["preview", str(recipe), "--rows", "1"])
        output = capsys.readouterr()
        assert stopped.value.code == (2 if path.name in REFUSED else 0), (path.name, output.err)
        if path.name in REFUSED:
            place, advice = REFUSED[path.name]
            assert f"{path.name}, {place}" in output.err and advice in output.err, output.err
            found[path.name] = True
    assert set(found) == set(REFUSED)


def test_every_input_is_tried_here(cases):
    """Those of pairs that need a run are tried in tests/training (kto5, grpo_vlong)."""
    tried = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for folder in ("rows", "pairs") for path in (cases / folder).iterdir()}
    missing = [name for name in names if name not in tried and name.removeprefix("tmpl_").split(".")[0] not in tried]
    assert sorted(missing) == []
