"""Every kind of finding: a row that must set it off, one that must not, and the exact count of all."""

import pytest

from finetune.data.formats.rows import Row
from finetune.data.lint.findings import KINDS, LintRow, LintSettings
from finetune.data.lint.lint_pass import lint_rows
from finetune.data.lint.lint_report import describe_fix, describe_lint
from finetune.errors import Place

SETTINGS = LintSettings(max_tokens=100, control_tokens=("<|eot_id|>", "</s>"))
LONG = (
    "The quick brown fox jumps over the lazy dog while seven wizards brew a pot of strong black tea near the old mill."
)


def make(question="Why is the sky blue?", answer="Because of the air.", **values):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"place": Place("a.jsonl", 1), "split": "train", "messages": messages, "tokens": 10}
    row |= values
    content = Row(list(row["messages"]), rejected=list(row.get("rejected") or []))
    return LintRow(**{"row": content, **row})


def lint(*rows):
    return lint_rows(rows, SETTINGS)


def counts(*rows):
    return lint(*rows).to_json()["counts"]


def pair(chosen, rejected):
    return make(answer=chosen, rejected=[{"role": "assistant", "content": rejected}])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("equal_answers", pair("Because of the air.", " Because of  the air.\n")),
        ("equal_answers", pair("caf\u00e9 au lait", "cafe\u0301 au lait")),
        ("too_long", make(tokens=101)),
        ("mojibake", make(answer="It isnâ€™t the sea.")),
        ("mojibake", make(question="FranÃ§oise, why is it so?")),
        ("mojibake", make(answer="It is \ufffd\ufffd blue.")),
        ("mojibake", make(question="天空为什么是蓝色的？", answer="天空是锟斤拷蓝色的。")),
        ("control_token", make(answer="It ends.</s> And goes on.")),
        ("control_token", make(question="What does <|eot_id|> mean?")),
        ("other_language", make(answer="因为空气把短波的光散射到各个方向。")),
        (
            "mixed_scripts",
            make(
                answer="天空是蓝色的，because short waves are scattered 所以我们看到 blue light from all sides of it 就是这样的"
            ),
        ),
        ("repeated_punctuation", make(answer="Because of the air!!!!")),
        ("repeated_punctuation", make(answer="Because of，，，，，the air.")),
        ("one_word", make(answer="Air.")),
        ("one_word", make(answer="42")),
        ("one_word", make(question="中国的首都是哪里？", answer="北京。")),
    ],
)
def test_a_row_that_sets_a_kind_off(kind, row):
    report = lint(row)
    assert report.to_json()["counts"] == {kind: 1}
    finding = report.findings[0]
    assert (finding.severity, finding.is_dropped) == (KINDS[kind].severity, KINDS[kind].is_dropped)
    assert (finding.examples[0].file, finding.examples[0].line) == ("a.jsonl", 1)
    assert finding.examples[0].text
    assert report.left_out == ({kind: 1} if KINDS[kind].is_dropped else {})


@pytest.mark.parametrize(
    "row",
    [
        make(),
        make(tokens=100),
        pair("Because of the air.", "Because of the sea."),
        make(answer="Voilà un café, naïve façade, Ångström: 25 °C, “quoted” – 100 €."),
        make(question="为什么？", answer="因为空气会散射光线……"),
        make(answer="Wait... what? Really?!"),
        make(answer="a\n-----\n| x | y |\n|---|---|\n***\nChapter one ........ 3"),
        make(answer="Use it so:\n```js\nfor (;;;;) {}\n```"),
        make(answer="It is < b and > c; see <s of it."),
        make(answer="Yes, it is."),
        make(question="中国的首都是哪里？", answer="是北京。"),
        make(question="请写一个把两个数相加的函数。", answer="```python\ndef add(a, b):\n    return a + b\n```"),
        make(question="Say it in Chinese: the sky is blue today.", answer="今天的天空是蓝色的，非常好看。"),
        make(messages=[{"role": "assistant", "content": "plain text of a web page goes here"}]),
    ],
)
def test_a_row_without_findings(row):
    report = lint(row)
    assert report.to_json()["counts"] == {}
    assert (report.rows, report.passed, report.left_out) == (1, 1, {})


@pytest.mark.parametrize("kind", ["unreadable", "role_order", "empty_text"])
def test_faults_are_findings(kind):
    report = lint(LintRow(Place("a.jsonl", 7), "train", fault=(kind, "what the reader said")))
    assert report.left_out == {kind: 1}
    assert report.to_json()["findings"] == [
        {
            "kind": kind,
            "severity": "error",
            "is_dropped": True,
            "count": 1,
            "examples": [{"file": "a.jsonl", "line": 7, "text": "what the reader said"}],
            "file": "a.jsonl",
            "line": 7,
            "text": "what the reader said",
        }
    ]


def test_duplicates_are_told_with_their_first():
    rows = [make(answer=f"Because of the {word}.", place=Place("a.jsonl", n)) for n, word in enumerate("aabab", 1)]
    report = lint(*rows)
    assert report.to_json()["counts"] == {"duplicate": 3}
    assert [(example.line, example.text[:17]) for example in report.findings[0].examples] == [
        (2, "the same as line "),
        (4, "the same as line "),
        (5, "the same as line "),
    ]
    assert [example.text.split(":")[0][-1] for example in report.findings[0].examples] == ["1", "1", "3"]
    assert (report.rows, report.passed, report.left_out) == (5, 2, {"duplicate": 3})


def test_rows_that_differ_in_their_system_line_are_no_duplicates():
    system = {"role": "system", "content": "Be brief."}
    row = make()
    assert counts(row, make(messages=[system, *row.messages])) == {}
    assert counts(make(LONG), make(messages=[system, *make(LONG).messages])) == {"near_duplicate": 1}


def test_the_same_question_with_another_answer_is_no_duplicate():
    assert counts(make(), make(answer="Because of the sea."), pair("Because of the air.", "No.")) == {}


def test_near_duplicates_are_reported_and_kept():
    report = lint(make(answer=LONG), make(answer=LONG.replace("mill", "bridge")), make(answer=LONG[::-1]))
    assert report.to_json()["counts"] == {"near_duplicate": 1}
    assert report.passed == 3
    assert "% the same as line 1: " in report.findings[0].examples[0].text


def test_overlap_with_what_is_evaluated_on():
    held_out = make(answer=LONG, split="evaluation", place=Place("b.jsonl", 9))
    report = lint(held_out, make(answer=LONG), make(answer=LONG.replace("mill", "bridge")), make())
    assert report.to_json()["counts"] == {"overlap": 1, "near_overlap": 1, "near_duplicate": 1}
    assert report.left_out == {"overlap": 1, "near_overlap": 1}
    assert report.findings[0].examples[0].text.startswith("the same as b.jsonl, line 9: ")


def test_a_row_with_two_faults_is_left_out_once():
    report = lint(make(), make(tokens=500))
    assert report.to_json()["counts"] == {"too_long": 1, "duplicate": 1}
    assert (report.passed, report.left_out) == (1, {"too_long": 1})


def test_three_examples_and_the_count_of_all():
    report = lint(*[make(question=f"What is {number}?", answer="Air.") for number in range(7)])
    assert (report.findings[0].count, len(report.findings[0].examples)) == (7, 3)
    assert "note one_word, 7 rows: answers of a single word" in describe_lint(report)
    assert "… and 4 more" in describe_lint(report)


def test_shares_of_tokens():
    report = lint(
        make(tokens=30, trained_tokens=10),
        make(
            question="天空为什么是蓝色的？",
            answer="因为空气散射短波的光。",
            tokens=60,
            trained_tokens=20,
            place=Place("b.jsonl", 1),
        ),
        make(
            question="天空为什么是红色的？",
            answer="因为太阳正在落山。",
            tokens=10,
            trained_tokens=5,
            place=Place("b.jsonl", 2),
        ),
    )
    assert (report.tokens, report.trained_tokens) == (100, 35)
    assert report.sources == {"a.jsonl": 30, "b.jsonl": 70}
    assert report.languages == {"Chinese": 70, "Latin": 30}
    assert " 70.0%  b.jsonl" in describe_lint(report)


def test_only_rows_that_pass_are_kept():
    kept = []
    rows = [
        make(),
        make(),
        make(tokens=101),
        make(answer="Air."),
        LintRow(Place("x"), "train", fault=("unreadable", "no")),
    ]
    report = lint_rows(rows, SETTINGS, kept.append)
    assert kept == [rows[0], rows[3]]
    assert describe_fix(report) == "wrote 2 of 5 rows (left out: 1 duplicate, 1 too_long, 1 unreadable)"


def test_nothing_found():
    assert "nothing found" in describe_lint(lint(make()))
    assert lint().to_json()["rows"] == 0
