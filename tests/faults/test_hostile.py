"""Hostile rows, recipes, templates and names end in one message: nothing runs, nothing hangs, nothing moves the cursor."""

import json
import os
import resource
import subprocess
import sys
import time

import pyarrow
import pytest

from finetune.cli.main import main
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.encoding.template import find_template
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.reading.raw_files import read_file
from finetune.errors import DataError, RecipeError, TemplateError
from finetune.exporting.card import _escape
from finetune.files.terminal import COLOUR, PLAIN_TEXT, escape_controls, escape_json, limit_seconds
from finetune.recipe.yaml_loader import parse_yaml

CONTROLS = "\x1b]0;title\x07 \x1b[2J \x9b31m \r \x08 \x7f \u202e txt \u2066 \u2028"


def test_control_characters_are_shown_not_sent():
    shown = escape_controls(f"a\tb\n{CONTROLS}")
    assert shown == ("a\tb\n\\x1b]0;title\\x07 \\x1b[2J \\x9b31m \\x0d \\x08 \\x7f \\u202e txt \\u2066 \\u2028")
    assert escape_controls(f"{COLOUR}x\x1b[1m{PLAIN_TEXT}", keeps_colour=True) == f"{COLOUR}x\\x1b[1m{PLAIN_TEXT}"
    assert escape_controls("中文 🙂 é\u0301 \u200d") == "中文 🙂 é\u0301 \u200d"


def test_json_keeps_its_values_when_controls_are_escaped():
    value = {"path": "C:\\x1b\\u00e9", "text": CONTROLS}
    text = escape_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert not set(text) & set("\x1b\x9b\x7f\u202e\u2066\u2028")


def write_recipe(folder, rows, text=""):
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: nano}}\ndata: {{train: {folder / 'rows.jsonl'}, max_tokens: 512}}\noutput: {folder / 'run'}\n{text}"
    )
    return recipe


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_rows_cannot_write_to_the_terminal(tmp_path, nano_llama, capsys, options):
    messages = [{"role": "user", "content": f"hi {CONTROLS}"}, {"role": "assistant", "content": f"ok {CONTROLS}"}]
    recipe = write_recipe(tmp_path, json.dumps({"messages": messages, f"key{CONTROLS}": 1}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(["preview", str(recipe), *options])
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    for text in (printed.out, printed.err):
        assert not set(text) & set("\x1b\x9b\x7f\x07\x08\r\u202e\u2066\u2028")


def test_messages_and_names_cannot_write_to_the_terminal(tmp_path, capsys):
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(folder / "no\x9b.yaml")])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert not set(printed.out + printed.err) & set("\x1b\x9b")


def test_a_console_without_unicode_gets_json_that_is_whole(tmp_path):
    """It got question marks."""
    code = "import sys; from finetune.cli.main import main; main(['recipes', '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert b"??" not in done.stdout


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:alert(1))", "\\[x\\](javascript:alert(1))"),
        ("a | b\nc", "a \\| b c"),
        ("https://example.org", "https:&#47;&#47;example.org"),
        ("base → sft", "base → sft"),
        ("my_model-2.4", "my_model-2.4"),
    ],
)
def test_the_card_shows_names_as_text(value, shown):
    """A checkpoint's name put HTML and a `javascript:` link into the card."""
    assert _escape(value) == shown


def test_a_bomb_of_aliases_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match="aliases stand for more than 100,000 values"):
        parse_yaml("\n".join(lines), "recipe.yaml")


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "[" * 50_000, "{a: " * 50_000, "a: !!python/object/apply:os.system [id]", "x" * 1_000_001]
)
def test_hostile_yaml_is_one_message(text):
    with pytest.raises(RecipeError):
        parse_yaml(text, "recipe.yaml")


def test_a_usual_alias_works():
    assert parse_yaml("a: &a {b: 1}\nc: *a", "recipe.yaml") == {"a": {"b": 1}, "c": {"b": 1}}


TEMPLATES = {
    "divides-by-zero": "{{ 1 / 0 }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "reads-files": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "asks-nothing": "{{ messages[99].content }}",
    "includes": "{% include '/etc/passwd' %}",
    "formats": "{{ '%s' % undefined_thing.there }}",
    "unknown-filter": "{{ messages | nothing }}",
    "cut": "{% for message in messages %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_one_message(nano_llama, tmp_path, name):
    source = "{{ bos_token }}{% generation %}" + TEMPLATES[name] + "{% endgeneration %}"
    (tmp_path / "own.jinja").write_text(source)
    started = time.monotonic()
    with pytest.raises(TemplateError):
        find_template(str(tmp_path / "own.jinja"), load_tokenizer(nano_llama))
    assert time.monotonic() - started < 60
    assert ChatTemplate("x", source).source == source


def test_a_block_that_takes_too_long_is_ended():
    with pytest.raises(TimeoutError), limit_seconds(0.05):
        while True:
            pass
    with limit_seconds(5):
        pass


def read_all(path):
    return list(read_file(path))


def test_a_row_that_no_model_can_read_is_refused_by_its_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 40_000_000 + b'"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: is longer than 32 MB"):
        read_all(file)


def test_a_long_line_takes_time_and_memory_in_proportion(tmp_path):
    """A row of 64 MB took 12 GB and two minutes, because every block was joined to all before it."""
    file = tmp_path / "rows.jsonl"
    text = "x" * 30_000_000
    file.write_text(f'{{"text": "{text}"}}\n{{"text": "last"}}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = read_all(file)
    assert [len(row["text"]) for _, row in rows] == [len(text), 4]
    assert [place.line for place, _ in rows] == [1, 2]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1_000_000_000


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_packed_bomb_is_refused(tmp_path, ending):
    file = tmp_path / f"rows.jsonl.{ending}"
    with pyarrow.output_stream(str(file), compression={"gz": "gzip", "zst": "zstd"}[ending]) as packed:
        for _ in range(300):
            packed.write((b" " * 9_999 + b"\n") * 100)
    with pytest.raises(DataError, match="unpacks to more than 200 times its"):
        read_all(file)


@pytest.mark.parametrize(
    "lines", [["a", "b", "c"], ["a", "", "b"], ["x" * (1 << 20), "y" * (1 << 20), "z"], ["x" * ((1 << 20) - 1), "b"]]
)
def test_lines_are_split_as_before_wherever_a_block_ends(tmp_path, lines):
    file = tmp_path / "text.txt"
    for end in ("", "\n"):
        file.write_text("\n".join(lines) + end)
        assert read_all(file)[0][1]["text"] == "\n".join(lines)


@pytest.mark.parametrize("output", ["a\0b", "x" * 300, "file/below"])
def test_a_path_that_no_system_takes_is_one_message(tmp_path, nano_llama, capsys, output):
    (tmp_path / "file").write_text("a file")
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    recipe = write_recipe(tmp_path, row + "\n", "trainer: {max_steps: 1}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(recipe), "-s", f"output={json.dumps(str(tmp_path / output))}"])
    assert stopped.value.code == 2, capsys.readouterr().err
