"""Files of JSON lines and JSON objects: what a killed process leaves in them, and what is kept."""

import json

import pytest

from finetune.files.json_files import read_lines, remove_later_lines, write_json


def make_line(step, text):
    return json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n"


def test_a_line_separator_within_a_text_ends_no_line(tmp_path):
    """U+2028, U+2029 and U+0085 end lines for `str.splitlines`, which cut completions into pieces that were no JSON."""
    file = tmp_path / "completions.jsonl"
    lines = [make_line(step, f"one\u2028two\u2029three\u0085four {step}") for step in (1, 2, 3)]
    file.write_text("".join(lines), encoding="utf-8")
    remove_later_lines(file, 2)
    assert file.read_text(encoding="utf-8") == "".join(lines[:2])
    assert [content["text"] for _, content in read_lines(file)] == [
        f"one\u2028two\u2029three\u0085four {step}" for step in (1, 2)
    ]


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "te', '{"step": 3, "text": "no end"}', "{", "[3]\n", "\x00\x00\n", '{"a": 1}\n']
)
def test_half_a_line_at_the_end_is_dropped(tmp_path, rest):
    """A process that was killed while it logged left half a line, and the run could not be resumed."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(make_line(1, "a") + make_line(2, "b") + rest, encoding="utf-8")
    remove_later_lines(file, 9)
    assert file.read_text(encoding="utf-8") == make_line(1, "a") + make_line(2, "b")


def test_a_character_that_was_cut_is_dropped_with_its_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes((make_line(1, "甲") + make_line(2, "乙")).encode()[:-5])
    remove_later_lines(file, 9)
    assert file.read_text(encoding="utf-8") == make_line(1, "甲")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "run.json", {"status": "running"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"status": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
