"""The rules of the table: exact values on answers as models write them."""

import json

import pytest

from finetune.errors import TrainingError
from finetune.recipe.sections import RewardsSection
from finetune.rewards.reward_functions import AnswerRewards, judge_answer
from finetune.rewards.rules import RULES, Answer, Rule, find_final_answer


def judge(name, text, question="How many apples are left?", **facts):
    return RULES[name].judge(Answer(question, text, **facts))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 5\nwait\n#### 1,200 dollars", "1,200 dollars"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{x^{2}+1}", "x^{2}+1"),
        (r"an open \boxed{3", "3"),
        ("first 3, then -4.5.", "-4.5"),
        ("答案是72个。", "72"),
        ("共１２个", "12"),  # full-width digits
        ("from 5-3 comes 2.", "2"),
        ("version v10 has none", None),
        ("nothing at all", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text, found):
    assert find_final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "reference", "reward"),
    [
        ("The answer is 72.", "48+24\n#### 72", 1.0),
        ("The answer is 72.0", "#### 72", 1.0),
        ("It costs $1,200", "#### 1200", 1.0),
        ("#### $1,200.00", "#### 1,200", 1.0),
        (r"\boxed{\frac{3}{4}}", "0.75", 1.0),
        ("#### 3/4", "#### 0.75", 1.0),
        ("50%", "#### 50", 1.0),
        ("72 apples and 3 pears", "#### 72", 0.0),
        ("The answer is 7", "#### 72", 0.0),
        ("The answer is -72", "#### 72", 0.0),
        (r"\boxed{ x + 1 }", r"\boxed{x+1}", 1.0),
        (r"\boxed{x+2}", r"\boxed{x+1}", 0.0),
        ("#### 3/0", "#### 3", 0.0),
        ("no number", "#### 3", 0.0),
        ("paris.", "Paris", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("", "#### 3", 0.0),
        ("1" * 10_000, "#### 3", 0.0),  # Python refuses to convert so many digits
    ],
)
def test_the_final_answer_is_compared_as_a_number(text, reference, reward):
    assert judge("final_answer", text, reference=reference) == reward


def test_every_answer_of_gsm8k_is_right_by_its_own_reference(shared):
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k_train.jsonl").read_text().splitlines()]
    references = [row["answer"] for row in rows]
    assert all(judge("final_answer", reference, reference=reference) == 1.0 for reference in references)
    # Without its mark the result is still the last number of nearly every solution.
    unmarked = [judge("final_answer", text.replace("#### ", ""), reference=text) for text in references]
    assert unmarked == [1.0] * len(rows)
    wrong = [judge("final_answer", f"{text}1", reference=text) for text in references]
    assert sum(wrong) == 0


def test_the_result_must_stand_in_a_marked_place():
    assert judge("format", "so\n#### 42") == 1.0
    assert judge("format", r"hence \boxed{42}.") == 1.0
    assert judge("format", "#### 42\nand more") == 0.0
    assert judge("format", "it is 42") == 0.0
    assert judge("format", "") == 0.0


@pytest.mark.parametrize(("tokens", "reward"), [(0, 1.0), (100, 1.0), (150, 0.5), (200, 0.0), (500, 0.0)])
def test_length_falls_evenly(tokens, reward):
    assert judge("length", "x", tokens=tokens, wanted_tokens=100) == reward


def test_language_is_the_questions():
    assert judge("language", "There are three apples left.") == 1.0
    assert judge("language", "还剩三个苹果") == 0.0
    assert judge("language", "还剩三个苹果", question="还剩几个苹果？") == 1.0
    assert judge("language", "三个 apples", question="还剩几个苹果？") == 2 / 3
    assert judge("language", "还剩", question="Translate 'left' into Chinese") == 1.0
    assert judge("language", "42", question="6 * 7 = ?") == 1.0
    assert judge("language", "", question="How many?") == 0.0


def test_the_penalties_are_negative():
    assert judge("truncated", "x", is_truncated=True) == -1.0
    assert judge("truncated", "x") == 0.0
    assert judge("one_sentence", "Three apples are left.") == -1.0
    assert judge("one_sentence", "") == -1.0
    assert judge("one_sentence", "Five were there. Two are gone.") == 0.0
    assert judge("one_sentence", "原来有五个。吃了两个。", question="还剩几个？") == 0.0
    assert judge("one_sentence", "Pi is 3.14 or so") == -1.0
    long_chinese = "一共有五个苹果，吃掉了两个，所以还剩下三个苹果"
    assert judge("mixed_language", long_chinese, question="How many apples are left now?") == -1.0
    assert judge("mixed_language", "Five apples were there and two of them have been eaten by now.") == 0.0


def test_a_rule_that_fails_names_the_row(monkeypatch):
    def divide(answer):
        return 1 / answer.tokens

    monkeypatch.setitem(RULES, "broken", Rule("broken", divide, ""))
    with pytest.raises(TrainingError, match=r"rows.jsonl, line 7: the reward broken failed .*ZeroDivisionError"):
        judge_answer("broken", Answer("q", "a", tokens=0), "rows.jsonl, line 7")
    monkeypatch.setitem(RULES, "broken", Rule("broken", lambda answer: float("nan"), ""))
    with pytest.raises(TrainingError, match="line 7: the reward broken gave nan for an answer to this row"):
        judge_answer("broken", Answer("q", "a"), "rows.jsonl, line 7")
    monkeypatch.setitem(RULES, "broken", Rule("broken", lambda answer: None, ""))
    with pytest.raises(TrainingError, match="gave None"):
        judge_answer("broken", Answer("q", "a"), "rows.jsonl, line 7")


def test_the_judge_sees_the_question_the_answer_and_its_end():
    judge = AnswerRewards(RewardsSection(rules={"truncated": 0.5, "final_answer": 2}), [2, 106], None)
    truncated, final = judge.make_functions()
    batch = {
        "prompts": [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]] * 2,
        "completions": [[{"role": "assistant", "content": "it is 4"}], [{"role": "assistant", "content": "it is 5"}]],
        "completion_ids": [[7, 8, 106], [7, 8, 9]],
        "answer": ["#### 4", "#### 4"],
        "origin": ["f, line 1", "f, line 1"],
        "trainer_state": None,
    }
    assert (truncated.__name__, truncated(**batch)) == ("truncated", [0.0, -1.0])
    assert (final.__name__, final(**batch)) == ("final_answer", [1.0, 0.0])
    assert [answer.rewards for answer in judge.answers] == [
        {"truncated": 0.0, "final_answer": 1.0},
        {"truncated": -1.0, "final_answer": 0.0},
    ]
    assert judge.answers[0].question == "q"
