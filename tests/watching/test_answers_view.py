"""The answers to the fixed prompts as they change over a run: equal ones are one line, and the page stays small."""

import json

from finetune.runs.run_files import EVALUATED_ANSWERS_FILE
from finetune.watching.answers_view import Stretch, merge_answers, spread_out
from finetune.watching.run_view import read_run

SAMPLES = [
    {"origin": "fixed", "prompt": "Who?", "before": "old", "after": "new"},
    {"origin": "a.jsonl, line 1", "prompt": "What?", "before": "x" * 700, "after": None},
]


def write_answers(run, *lines):
    text = "".join(f"{json.dumps({'step': step, 'answers': answers})}\n" for step, *answers in lines)
    (run / EVALUATED_ANSWERS_FILE).write_text(text)
    return run


def test_equal_answers_in_a_row_are_one_stretch():
    lines = [(2, "a"), (4, "a"), (6, "b"), (8, "a"), (10, "a")]
    lines = [{"step": step, "answers": [text]} for step, text in lines]
    expected = [Stretch(2, 4, "a"), Stretch(6, 6, "b"), Stretch(8, 10, "a")]
    assert merge_answers(lines, 0) == expected and merge_answers(lines, 1) == []


def test_the_course_of_each_prompt_is_read(write_run):
    long = "y" * 600
    lines = [(2, "old", f"{long}1"), (4, "old", f"{long}2"), (6, "\x1b[31m", "x" * 700), (8, "new", "x" * 700)]
    first, second = read_run(write_answers(write_run(answers=SAMPLES), *lines)).answers
    assert first.course == (Stretch(2, 4, "", "before"), Stretch(6, 6, "\\x1b[31m"), Stretch(8, 8, "", "after"))
    # Texts that differ only behind what the page shows are two answers.
    cut = f"{long} …"
    assert second.course == (Stretch(2, 2, cut), Stretch(4, 4, cut), Stretch(6, 8, "", "before"))
    assert (second.after, second.unshown) == (None, 0)


def test_of_many_answers_some_are_shown_evenly(write_run):
    course = [Stretch(step, step, str(step)) for step in range(101)]
    assert [one.first for one in spread_out(course, 5)] == [0, 25, 50, 75, 100] and spread_out(course[:5], 5) == course[
        :5
    ]
    (answer,) = read_run(
        write_answers(write_run(answers=SAMPLES[:1]), *((step, str(step)) for step in range(1, 101)))
    ).answers
    assert len(answer.course) == 24 and answer.unshown == 76
    assert (answer.course[0].first, answer.course[-1].first) == (1, 100)


def test_a_damaged_line_is_left_out(write_run):
    run = write_answers(write_run(answers=SAMPLES[:1]), (2, "a"), (4,))
    with (run / EVALUATED_ANSWERS_FILE).open("a") as file:
        file.write('{"step": 6, "answers": null}\n{"step": 8}\n{"step": 10, "answers": "b"}\n{"step": 12, "answ')
    (answer,) = read_run(run).answers
    assert answer.course == (Stretch(2, 2, "a"),)
