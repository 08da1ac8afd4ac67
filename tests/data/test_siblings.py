"""Relatives of the inputs that once failed (`test_failed_inputs.py`): a fault is that of a whole kind."""

import gzip
import json

import pytest
from rendered import END, chat, load, read_pair, read_sequence, render, render_pair, say, write

from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.lint.lint_data import lint_data
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, TemplateError

Q, A, B = "Why?", "So.", "No."
ROW = {"prompt": Q, "completion": A}
TOOL = {"name": "add", "parameters": {"type": "object"}}
DIGITS = "9" * 5000


@pytest.fixture
def tokenizer(nano_llama):
    return load_tokenizer(nano_llama)


@pytest.fixture
def read(tokenizer, tmp_path):
    """Return a function that returns texts and trained parts of a file's rows, and the notes."""

    def run(content, name="rows.jsonl", **settings):
        splits = load(write(tmp_path / name, content), tokenizer, **settings)
        return [read_sequence(row, tokenizer) for row in splits.train], list(splits.report.notes)

    return run


@pytest.fixture
def refuse(tokenizer, tmp_path):
    """Return a function that returns the message about a file, without its path."""

    def run(content, name="rows.jsonl", **settings):
        with pytest.raises(DataError) as caught:
            load(write(tmp_path / name, content), tokenizer, **settings)
        return str(caught.value).replace(f"{tmp_path / name}", "FILE")

    return run


# Rows.

CALL = {"function_call": {"name": "add", "arguments": {"a": 1}}}
READ = {
    "system beside prompt": ([{**ROW, "system": "S"}], chat(Q, A, system="S"), None),
    "system beside alpaca": ([{"instruction": Q, "output": A, "system": "S"}], chat(Q, A, system="S"), None),
    "tools beside alpaca": ([{"instruction": Q, "output": A, "tools": [TOOL]}], chat(Q, A), [TOOL]),
    "input beside prompt": ([{**ROW, "input": "I"}], chat(f"{Q}\nI", A), None),
    "an older call": (
        [{"messages": [say("user", Q), {"role": "assistant", "content": None, **CALL}]}],
        [say("user", Q), {**say("assistant", ""), "calls": [("add", {"a": 1})]}],
        None,
    ),
    "two calls in two messages": (
        [
            {
                "messages": [
                    say("user", Q),
                    say("tool_call", '{"name": "add", "arguments": {"a": 1}}'),
                    say("tool_call", '{"name": "add", "arguments": {"a": 2}}'),
                    say("tool_response", "1"),
                    say("tool_response", "2"),
                    say("assistant", A),
                ]
            }
        ],
        [
            say("user", Q),
            {**say("assistant", ""), "calls": [("add", {"a": 1}), ("add", {"a": 2})]},
            say("tool", "1"),
            say("tool", "2"),
            say("assistant", A),
        ],
        None,
    ),
    "names of roles": ([{"messages": [say("Human", Q), say("Bot", A)]}], chat(Q, A), None),
    "names of ShareGPT's roles": (
        [
            {
                "conversations": [
                    {"from": "developer", "value": "S"},
                    {"from": "USER", "value": Q},
                    {"from": "model", "value": A},
                ]
            }
        ],
        chat(Q, A, system="S"),
        None,
    ),
    "an empty system message of parts": (
        [{"messages": [{"role": "system", "content": []}, *chat(Q, A)]}],
        chat(Q, A),
        None,
    ),
    "an empty ShareGPT system": (
        [
            {
                "conversations": [
                    {"from": "system", "value": " "},
                    {"from": "human", "value": Q},
                    {"from": "gpt", "value": A},
                ]
            }
        ],
        chat(Q, A),
        None,
    ),
    "no system text": ([{"messages": [{"role": "system", "content": None}, *chat(Q, A)]}], chat(Q, A), None),
    "a result of null": (
        [{"messages": [say("user", Q), {"role": "assistant", **CALL}, say("function", None), say("assistant", A)]}],
        [say("user", Q), {**say("assistant", ""), "calls": [("add", {"a": 1})]}, say("tool", ""), say("assistant", A)],
        None,
    ),
    "an empty instruction of blanks": ([{"instruction": " \n", "input": Q, "output": A}], chat(Q, A), None),
    "no instruction": ([{"instruction": None, "input": Q, "output": A}], chat(Q, A), None),
    "an empty prompt": ([{"prompt": "", "input": Q, "completion": A}], chat(Q, A), None),
    "messages as JSON": ([{"messages": json.dumps(chat(Q, A))}], chat(Q, A), None),
    "ShareGPT as JSON": (
        [{"conversations": json.dumps([{"from": "human", "value": Q}, {"from": "gpt", "value": A}])}],
        chat(Q, A),
        None,
    ),
    "a prompt as JSON": ([{"prompt": json.dumps(chat(Q, system="S")), "completion": A}], chat(Q, A, system="S"), None),
    "an answer that is JSON": ([{"prompt": Q, "completion": '[{"a": 1}]'}], chat(Q, '[{"a": 1}]'), None),
    "an answer that is a list": ([{"prompt": Q, "completion": "[1, 2"}], chat(Q, "[1, 2"), None),
    "a transcript": ([{"prompt": f"Human: {Q}\n\nAssistant:", "completion": f" {A}"}], chat(Q, A), None),
    "no transcript": ([{"prompt": "Human: hello", "completion": A}], chat("Human: hello", A), None),
    "speakers in an answer": (
        [{"prompt": Q, "completion": "\n\nHuman: x\n\nAssistant: y"}],
        chat(Q, "\n\nHuman: x\n\nAssistant: y"),
        None,
    ),
    "an output list of one": ([{"instruction": Q, "output": [A]}], chat(Q, A), None),
    "a class of a text": ([{**ROW, "label": "good"}], chat(Q, A), None),
    "a class by its number": ([{"instruction": Q, "output": A, "label": 3}], chat(Q, A), None),
}


@pytest.mark.parametrize("name", READ)
def test_rows_that_are_read(read, name):
    rows, messages, tools = READ[name]
    assert read(rows)[0] == [render(messages, tools)]


FAULTS = {
    "thinking": ({"messages": [say("user", Q), {**say("assistant", A), "thinking": "T"}]}, "'thinking'"),
    "a thought of ShareGPT": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A, "reasoning": "T"}]},
        "'reasoning'",
    ),
    "a thought in an answer": ({"prompt": Q, "completion": [{**say("assistant", A), "thought": "T"}]}, "'thought'"),
    "a weight of 2": ({"messages": [say("user", Q), {**say("assistant", A), "weight": 2}]}, "weight of message 2 is 2"),
    "a message masked by half": (
        {"messages": [say("user", Q), {**say("assistant", A), "masked": 0.5}]},
        "masked of message 2 is 0.5",
    ),
    "a row's weight": ({**ROW, "loss_weight": 0.25}, "loss_weight of the row is 0.25"),
    "a mask of tokens": ({**ROW, "loss_mask": [0, 1]}, "loss_mask of the row is a list"),
    "pictures": ({**ROW, "images": ["a.png"]}, "has 'images'"),
    "a picture among parts": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, say("assistant", A)]},
        "'image_url'; only text parts",
    ),
    "NaN in tools": ({**ROW, "tools": [{**TOOL, "minimum": float("nan")}]}, "NaN or Infinity"),
    "Infinity in a call": (
        {"messages": [say("user", Q), say("function_call", '{"name": "add", "arguments": {"a": -Infinity}}')]},
        "NaN or Infinity",
    ),
    "a number of the text": (
        {"messages": [say("user", Q), say("function_call", f'{{"name": "add", "arguments": {{"a": {DIGITS}}}}}')]},
        "is no JSON (Exceeds the limit",
    ),
    "Python's notation": ({"messages": "[{'role': 'user', 'content': 'Q'}]"}, "write it with json.dumps"),
    "results in another order": (
        {
            "messages": [
                say("user", Q),
                {"role": "assistant", "tool_calls": [{"id": name, "function": {"name": name}} for name in "ab"]},
                {**say("tool", "1"), "tool_call_id": "b"},
                {**say("tool", "2"), "tool_call_id": "a"},
                say("assistant", A),
            ]
        },
        "message 3 is the result of 'b', where that of 'a' is expected",
    ),
    "two answers of one speaker": ({"messages": [*chat(Q, A), say("assistant", B)]}, "data.merge_turns: true"),
    "two ShareGPT questions": (
        {"conversations": [{"from": "human", "value": Q}] * 2 + [{"from": "gpt", "value": A}]},
        "data.merge_turns: true",
    ),
    "an empty answer of HH": (
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: ", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"},
        "the content of message 2 is empty",
    ),
    "a question in messages": ({"messages": chat(Q), "chosen": A, "rejected": B}, "data.columns: {prompt: messages}"),
    "one side of HH": (
        {"prompt": Q, "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": B},
        "chosen is a text with Human: and Assistant:, and rejected is not",
    ),
    "only a greeting": ({"messages": [say("assistant", A)]}, "message 1 is of the assistant"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_that_are_refused(refuse, name):
    row, fault = FAULTS[name]
    message = refuse([ROW, row] if "prompt" in row else [row])
    assert fault in message
    assert message.startswith(f"FILE, line {1 + ('prompt' in row)}: ")


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("start", [[], [say("assistant", "Hello!")]])
def test_rows_whose_answers_are_all_marked_are_left_out(read, train_on, start):
    """They stopped the run as rows without a trained token."""
    marked = {"messages": [*start, say("user", Q), {**say("assistant", A), "weight": 0}]}
    rows, notes = read([marked, {"messages": chat(Q, B)}], train_on=train_on)
    assert rows == [render(chat(Q, B))]
    assert "1 row is left out: marked as not trained" in notes


@pytest.mark.parametrize(
    ("messages", "joined"),
    [
        (chat(Q, A)[:1] + chat("Please.", A), chat(f"{Q}\n\nPlease.", A)),
        ([*chat(Q, A), say("assistant", B)], chat(Q, f"{A}\n\n{B}")),
        ([say("system", "S"), say("system", "T"), *chat(Q, A)], chat(Q, A, system="S\n\nT")),
        (
            [
                say("user", Q),
                say("assistant", A),
                {"role": "assistant", **CALL},
                say("tool", "1"),
                say("tool", "2"),
                say("assistant", B),
            ],
            [
                say("user", Q),
                {**say("assistant", A), "calls": [("add", {"a": 1})]},
                say("tool", "1"),
                say("tool", "2"),
                say("assistant", B),
            ],
        ),
    ],
)
def test_turns_of_one_speaker_are_joined(read, messages, joined):
    assert read([{"messages": messages}], merge_turns=True)[0] == [render(joined)]


def test_turns_that_differ_in_their_marks_are_not_joined(refuse):
    messages = [*chat(Q, A), {**say("assistant", B), "train": False}]
    assert "message 3 cannot be joined with the one before it" in refuse([{"messages": messages}], merge_turns=True)


PAIRS = {
    "a turn of the prompt goes on": (
        {"prompt": chat(Q, "Well,"), "chosen": [say("assistant", A)], "rejected": [say("assistant", B)]},
        {"merge_turns": True},
        (chat(Q), f"Well,\n\n{A}", f"Well,\n\n{B}"),
    ),
    "two questions of HH": (
        {
            f"{side}": f"\n\nHuman: {Q}\n\nHuman: Please.\n\nAssistant: {text}"
            for side, text in (("chosen", A), ("rejected", B))
        },
        {"merge_turns": True},
        (chat(f"{Q}\n\nPlease."), A, B),
    ),
    "HH beside a prompt": (
        {
            "prompt": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {Q}\n\nAssistant:",
            "chosen": f" {A}",
            "rejected": f" {B}\n",
        },
        {},
        (chat("Hi", "Yes?", Q), A, B),
    ),
    "system and ranked outputs": (
        {"system": "S", "instruction": Q, "input": "I", "output": [A, B]},
        {},
        (chat(f"{Q}\nI", system="S"), A, B),
    ),
    "earlier turns beside ranked outputs": (
        {"instruction": Q, "output": [A, B], "history": [["Hi", "Yes?"]]},
        {},
        (chat("Hi", "Yes?", Q), A, B),
    ),
    "a system message in a prompt of messages": (
        {"prompt": chat(Q, system="S"), "chosen": A, "rejected": B},
        {},
        (chat(Q, system="S"), A, B),
    ),
    "input alone": ({"instruction": "", "input": Q, "chosen": A, "rejected": B}, {}, (chat(Q), A, B)),
    "one message as JSON": (
        {"prompt": Q, "chosen": json.dumps(say("assistant", A)), "rejected": json.dumps(say("assistant", B))},
        {},
        (chat(Q), A, B),
    ),
    "ShareGPT as JSON": (
        {
            "conversations": json.dumps([{"from": "human", "value": Q}]),
            "chosen": json.dumps({"from": "gpt", "value": A}),
            "rejected": json.dumps({"from": "gpt", "value": B}),
        },
        {},
        (chat(Q), A, B),
    ),
    "ms-swift in ShareGPT's keys": (
        {"messages": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "rejected_response": B},
        {},
        (chat(Q), A, B),
    ),
    "ms-swift with a system": (
        {"system": "S", "messages": chat(Q, A), "rejected_response": B},
        {},
        (chat(Q, system="S"), A, B),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tokenizer, tmp_path, name):
    row, settings, (prompt, chosen, rejected) = PAIRS[name]
    splits = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, shape="pair", **settings)
    assert read_pair(splits.train[0], tokenizer) == render_pair(prompt, chosen, rejected)


@pytest.mark.parametrize("values", [(1, 0), (1.0, 0.0), ("1", "0"), ("True", "FALSE"), (True, False)])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
def test_labels(tokenizer, tmp_path, values, name):
    rows = [{"prompt": Q, "completion": text, "label": value} for text, value in zip((A, B), values, strict=True)]
    if name != "rows.jsonl":
        sign = "," if name == "rows.csv" else "\t"
        rows = "".join(sign.join(map(str, line)) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)])
    splits = load(write(tmp_path / name, rows), tokenizer, shape="labelled")
    assert splits.train["label"] == [True, False]
    assert [tokenizer.decode(ids) for ids in splits.train["completion_ids"]] == [A + END, B + END]


@pytest.mark.parametrize("label", [2, "maybe", [True]])
def test_labels_that_say_neither(refuse, label):
    rows = [{**ROW, "label": True}, {**ROW, "label": label}]
    assert "expected true or false, or 1 or 0" in refuse(rows, shape="labelled")


# Files.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", [ROW, ROW]),
        ("rows.json", "\ufeff\n" + json.dumps(ROW) + "\r\n\n" + json.dumps(ROW)),
        ("rows.jsonl", json.dumps([ROW, ROW], indent=1)),
        ("rows.jsonl", json.dumps([ROW, ROW])),
        ("rows.ndjson", [ROW, ROW]),
        ("rows.ndjson.gz", gzip.compress(f"{json.dumps(ROW)}\n".encode() * 2, mtime=0)),
        ("rows.tsv", f"prompt\tcompletion\n{Q}\t{A}\n\n{Q}\t{A}\n"),
        ("rows.tsv.gz", gzip.compress(f"prompt\tcompletion\n{Q}\t{A}\n{Q}\t{A}\n".encode(), mtime=0)),
        ("rows.csv", f'\ufeffprompt,completion\r\n"{Q}",{A}\r\n{Q},{A}'),
        ("rows.jsonl", f"\ufeff{json.dumps(ROW)}\n{json.dumps(ROW)}"),
    ],
)
def test_names_of_files_do_not_decide(read, name, content):
    assert read(content, name) == ([render(chat(Q, A))] * 2, [])


def test_an_unnamed_column_is_named(read):
    """Tables that pandas writes begin with one."""
    assert read(f",prompt,completion\n0,{Q},{A}\n", "rows.csv")[1] == ["keys not used: (unnamed) (1 row)"]


@pytest.mark.parametrize("encoding", ["UTF8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_marks_of_the_byte_order_are_no_text(read, encoding):
    text = f"\ufeff{json.dumps(ROW)}\n".removeprefix("\ufeff" if encoding in ("utf-8-sig", "utf-16") else "")
    assert read(text.encode(encoding), encoding=encoding)[0] == [render(chat(Q, A))]


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "euc_kr", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.csv.gz", "rows.txt"])
def test_encodings_are_proposed_and_read(read, refuse, encoding, name):
    text = {"cp1252": "Où est la mer, près d’ici ?", "euc_kr": "바다는 무엇입니까", "big5": "日本人學校"}.get(
        encoding, "日本人学校"
    )
    row = json.dumps({"prompt": text, "completion": A}, ensure_ascii=False)
    written = {"jsonl": row, "json": f"[\n{row}]", "txt": text}
    sign = "\t" if "tsv" in name else ","
    content = written.get(name.split(".")[1], f'prompt{sign}completion\n"{text}"{sign}{A}\n').encode(encoding)
    content = gzip.compress(content) if name.endswith(".gz") else content
    fault = refuse(content, name)
    assert "is not UTF-8 text" in fault
    assert encoding in fault
    assert "set data.encoding" in fault
    ((found, _),), _ = read(content, name, encoding=encoding)
    assert text in found


def test_one_broken_byte_is_no_other_encoding(refuse):
    row = json.dumps({"prompt": "海是什么？" * 9, "completion": A}, ensure_ascii=False).encode() + b"\n"
    broken = row.replace("海".encode(), b"\xe6\xb5", 1)
    place = 2 * len(row) + broken.index(b"\xe6\xb5")
    assert refuse(row * 2 + broken) == f"FILE, line 3: is not UTF-8 text (byte {place}); save the file as UTF-8"


def test_the_wrong_encoding_is_named(refuse):
    assert "is no big5 text, which data.encoding names" in refuse(
        b'{"text": "a"}\n{"text": "\xff\xff"}', encoding="big5"
    )


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rows.csv", f'prompt,completion\n"a\nb",{A}\nx,y,z\n', "line 4: has 3 fields where the first line has 2"),
        ("rows.csv", f'prompt,completion\n\n\n{Q},{A}\n"x,y\n{Q},{A}\n', "line 5: broken CSV (unexpected end of data)"),
        ("rows.tsv", f"prompt\tcompletion\n{Q}\t{A}\n{Q}\n", "line 3: has 1 fields"),
        ("rows.csv", f"prompt,prompt,completion\n{Q},{Q},{A}\n", "line 1: names the column 'prompt' twice"),
        (
            "rows.json",
            f'[{{"prompt": "a", "completion": "b"}},\n{{"id": {DIGITS}}}]',
            "line 2: holds a number of more digits",
        ),
        ("rows.ndjson", f'{{"a": "1", "id": -{DIGITS}}}', "line 1: holds a number of more digits"),
        ("rows.jsonl", f'[{{"id": {DIGITS}}}]', "line 1: holds a number of more digits"),
        ("rows.json", '{"data": [{"a": 1}],\n"n": 1}', "its rows may be the list under 'data'"),
    ],
)
def test_faults_of_files(refuse, name, content, fault):
    assert fault in refuse(content, name)


def test_long_cells_and_lines(read):
    text = "x" * 150_000
    for name, content in (
        ("rows.tsv", f"prompt\tcompletion\n{Q}\t{text}\n"),
        ("rows.csv", f'prompt,completion\n{Q},"{text}"\n'),
        ("rows.csv.gz", gzip.compress(f"prompt,completion\n{Q},{text}\n".encode(), mtime=0)),
    ):
        assert read(content, name, max_tokens=10**6)[0] == [render(chat(Q, text))]


# Bad rows.


def test_bad_rows_are_left_out_and_named(read, refuse):
    lines = [
        json.dumps({"prompt": "Q", "completion": ""}),
        json.dumps(ROW),
        '{"prompt": ',
        json.dumps({"other": 1}),
        '{"prompt": "\\ud800", "completion": "a"}',
        json.dumps({**ROW, "images": ["a"]}),
        json.dumps({**ROW, "prompt": "Really?"}),
    ]
    content = "\n".join(lines)
    assert refuse(content).startswith(
        "5 rows cannot be trained:\n  FILE, line 1: completion is empty\n  FILE, line 3: broken"
    )
    rows, (note,) = read(content, bad_rows="drop")
    assert rows == [render(chat(Q, A)), render(chat("Really?", A))]
    assert note.startswith("5 bad rows are left out (data.bad_rows: drop): ")
    assert "rows.jsonl, line 1: completion is empty; " in note
    assert note.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("content", "shape", "bad"),
    [
        ([{"other": 1}, ROW], "sequence", "line 1: the keys other fit no format"),
        ("prompt,completion\na\n" + f"{Q},{A}\n", "sequence", "line 2: has 1 fields"),
        (
            [{"prompt": Q, "chosen": A, "rejected": A}, {"prompt": Q, "chosen": A, "rejected": B}],
            "pair",
            "are the same",
        ),
        ([ROW, {"messages": chat(Q, A)}], "sequence", "line 2: has no 'prompt'"),
    ],
)
def test_bad_rows_of_every_kind(tokenizer, tmp_path, content, shape, bad):
    path = write(tmp_path / ("rows.csv" if isinstance(content, str) else "rows.jsonl"), content)
    with pytest.raises(DataError):
        load(path, tokenizer, shape=shape)
    report = load(path, tokenizer, shape=shape, bad_rows="drop").report
    assert (report.train.rows, report.train.rows_read + sum(report.left_out.values())) == (1, 2)
    assert report.train.rows_read == report.train.rows + report.train.dropped
    assert "1 bad row is left out (data.bad_rows: drop): " in report.notes[0]
    assert bad in report.notes[0]


def test_rows_that_the_template_refuses(tokenizer, tmp_path):
    """One such row stopped the run without its place."""
    template = tmp_path / "strict.jinja"
    own = find_template("yulan-mini", tokenizer).source
    refusal = "{%- for m in messages -%}{%- if 'bad' in m['content'] -%}{{ raise_exception('no!') }}{%- endif -%}{%- endfor -%}"
    template.write_text(own + refusal, encoding="utf-8")
    path = write(tmp_path / "rows.jsonl", [ROW, {**ROW, "prompt": "bad"}, {**ROW, "prompt": "good"}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*the chat template cannot be rendered: no!"):
        load(path, tokenizer, template=str(template))
    report = load(path, tokenizer, template=str(template), bad_rows="drop", overflow="drop").report
    assert (report.train.rows, report.train.dropped, report.train.bad) == (2, 1, 1)
    assert len(report.notes) == 1
    assert "line 2" in report.notes[0]


def test_only_bad_rows(refuse):
    assert refuse([{"prompt": "Q", "completion": ""}] * 3, bad_rows="drop") == (
        "no row is left for training: 3 bad rows are left out (data.bad_rows: drop): FILE, line 1: completion is empty; "
        "FILE, line 2: completion is empty; FILE, line 3: completion is empty"
    )


@pytest.mark.parametrize("mark", [{"trainable": False}, {"masked": True}, {"masked": "true"}])
def test_marks_of_other_tools_leave_an_answer_untrained(read, mark):
    """They were named as keys that are not used, and the answers were trained."""
    asked = {**say("user", Q), "masked": True}
    rows = [{"messages": [asked, {**say("assistant", A), **mark}, asked, {**say("assistant", B), "masked": False}]}]
    ((_, trained),), notes = read(rows)
    assert trained == [f"{B}{END}"] and not notes


def test_rows_that_are_all_left_out(refuse, tmp_path):
    """The message was "all 0 exceed data.max_tokens"; held-out rows that were all left out cost the evaluation, without a word."""
    unmarked = [{**ROW, "train": False}] * 2
    assert refuse(unmarked) == "no row is left for training: 2 rows are left out: marked as not trained"
    held_out = write(tmp_path / "held.jsonl", unmarked)
    assert (
        refuse([ROW], evaluation=(Source(held_out),))
        == "no held-out row is left: 2 rows are left out: marked as not trained"
    )


# Equal rows, templates, folders.

LINT = {
    "tools": [{**ROW, "tools": [{**TOOL, "name": name}]} for name in "ab"],
    "system": [{**ROW, "system": name} for name in "ab"],
    "marks": [
        {"messages": [*chat(Q, A), say("user", "x"), say("assistant", B)]},
        {"messages": [say("user", Q), {**say("assistant", A), "train": False}, say("user", "x"), say("assistant", B)]},
    ],
    "calls in a pair": [
        {"prompt": Q, "chosen": [{"role": "assistant", "tool_calls": [{"name": name}]}], "rejected": B} for name in "ab"
    ],
}


@pytest.mark.parametrize("name", LINT)
def test_lint_keeps_rows_that_differ(tokenizer, tmp_path, name):
    path = write(tmp_path / "rows.jsonl", LINT[name])
    report = lint_data(
        DataSettings((Source(path),)), tokenizer, find_template("yulan-mini", tokenizer), tmp_path / "out"
    )
    assert (report.rows, report.passed) == (2, 2)
    assert (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").count("\n") == 2


def make_template(answer, prompt, start=""):
    """Return a template with an answer (`#` stands for its text, `[` and `]` for the marks) and a generation prompt."""
    answer = answer.replace("[", "' -}}{%- generation -%}{{- '").replace("]", "' -}}{%- endgeneration -%}{{- '")
    answer = answer.replace("#", "' + m['content'] + '")
    return (
        "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{{- '"
        + answer
        + "' -}}{%- else -%}"
        "{{- '<|start_header_id|>' + m['role'] + '\\n' + m['content'] + '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + prompt + "' -}}{%- endif -%}"
    )


HEAD = "<|start_header_id|>assistant\\n"


@pytest.mark.parametrize(
    ("answer", "prompt", "fault"),
    [
        (HEAD + "[#<|eot_id|>]", "", "has no generation prompt"),
        (HEAD + "[#<|eot_id|>]", "<|start_header_id|>model\\n", "is asked in another text than it is trained in"),
        (HEAD + "[#<|eot_id|>]", HEAD + " ", "is asked in another text than it is trained in"),
        (
            HEAD + "[#<|eot_id|>]",
            HEAD.removesuffix("\\n"),
            "between the generation prompt and the trained text stands '\\n'",
        ),
        (
            HEAD + "<think></think>[#<|eot_id|>]",
            HEAD,
            "between the generation prompt and the trained text stands '<think>",
        ),
        ("[" + HEAD + "#<|eot_id|>]", HEAD, "trains the header of the answer"),
        ("<|start_header_id|>[assistant\\n#<|eot_id|>]", HEAD, "trains the header of the answer, 'assistant\\n'"),
        (HEAD + "[#<|eot_id|>]", HEAD, None),
        ("[#<|eot_id|>]", "", None),
        (HEAD + "<think></think>[#<|eot_id|>]", HEAD + "<think></think>", None),
    ],
)
def test_templates(tokenizer, tmp_path, answer, prompt, fault):
    path = tmp_path / "own.jinja"
    path.write_text(make_template(answer, prompt), encoding="utf-8")
    if fault is None:
        assert find_template(str(path), tokenizer).name == str(path)
        return
    with pytest.raises(TemplateError) as caught:
        find_template(str(path), tokenizer)
    assert fault in str(caught.value).replace("\n", "\\n")


def test_left_out_files_are_named_as_they_are_now(tokenizer, tmp_path):
    """The rows are kept in the cache, and with them the sentence about the files was."""
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    write(folder / "train.jsonl", [ROW])
    notes = [load(folder, tokenizer, cache=cache).report.notes]
    for name in ("test.jsonl", ".hidden.jsonl"):
        write(folder / name, [ROW])
        notes.append(load(folder, tokenizer, cache=cache).report.notes)
    (folder / "test.jsonl").unlink()
    notes.append(load(folder, tokenizer, cache=cache).report.notes)
    assert len(list(cache.iterdir())) == 1
    assert [tuple(note.split(": ", 1)[1] for note in found) for found in notes] == [
        (),
        ("test.jsonl (split test)",),
        (".hidden.jsonl (hidden), test.jsonl (split test)",),
        (".hidden.jsonl (hidden)",),
    ]
