"""What the page shows of rows, of the machine and of each method's metrics, from files with known content."""

import json

import pytest

from finetune.runs.run_files import EVALUATED_ANSWERS_FILE
from finetune.watching.board_page import render_board
from finetune.watching.run_view import read_board, read_run

HOSTILE = "</script><img src=x>\u202e"
SIDE = {"origin": "a.jsonl, line 1", "side": "", "tokens": 9, "trained": 4, "pieces": [["Ask", False], [HOSTILE, True]]}
MEASURED = [
    {"origin": "a.jsonl, line 1", "source": "a.jsonl", "trained": 4, "before": 5.0, "after": 3.0},
    {"origin": "a.jsonl, line 2", "source": "a.jsonl", "trained": 2, "before": 2.0, "after": 0.0},
    {"origin": "b.jsonl, line 1", "source": "b.jsonl", "trained": 1, "before": 4.0, "after": None},
]
ROWS = {
    "measure": "loss, nats a trained token",
    "is_mean": True,
    "preview": [SIDE],
    "rows": MEASURED,
    "rankings": [
        {"title": "Rows of the highest loss", "rows": [{"number": 0, "sides": [SIDE]}]},
        {"title": "", "rows": []},
    ],
}
MACHINE = [
    {"step": 1, "seconds_left": 7300, "tokens_per_second": 900, "memory_bytes": 1e9, "disk_free_bytes": 2e9},
    {
        **{"step": 2, "seconds_left": 150, "tokens_per_second": 1000.4, "memory_bytes": 2e9, "disk_free_bytes": 1.5e9},
        **{"gpu_memory_bytes": 6e9, "gpu_peak_bytes": 6.5e9, "gpu_temperature": 61, "gpu_power_watts": 180.4},
        "gpu_utilisation": 0.97,
    },
]


def test_the_machine_is_shown_against_the_plan(write_run):
    run = read_run(write_run(machine=MACHINE))
    expected = {
        "time left": "2 min",
        "tokens a second": "1,000",
        "GPU memory, peak": "6.50 of 7.20 planned GB",
        "GPU temperature": "61 °C",
        "GPU power": "180 W",
        "GPU utilisation": "97%",
        "main memory of the process": "2.00 GB",
        "disk left": "1.50 GB",
    }
    assert dict(list(run.figures.items())[-len(expected) :]) == expected
    charts = {chart.title: {label: curve.points for label, curve in chart.curves.items()} for chart in run.charts}
    assert charts["GPU memory, GB"] == {"in use": [(2, 6.0)], "planned peak": [(2, 7.2)]}
    assert charts["tokens a second"] == {"training": [(1, 900), (2, 1000.4)]}


def test_the_held_out_loss_has_its_standard_error(write_run):
    lines = [{"step": step, "eval_loss": 3.0 - step, "eval_loss_stderr": 0.25} for step in (1, 2)]
    run = read_run(write_run(lines=lines))
    assert run.figures["held-out loss"] == "1.000 ± 0.250"
    assert run.charts[0].curves["held-out rows"].errors == [(1, 0.25), (2, 0.25)]
    # A run that kept the weights of an earlier step shows their loss.
    result = {"steps": 2, "train_loss": 1.0, "eval_loss": 2.0, "best_step": 1, "seconds": 1.0, "tokens": 1}
    assert read_run(write_run(lines=lines, result=result)).figures["held-out loss"] == "2.000 ± 0.250"


def test_rows_are_shown_with_place_and_loss(write_run):
    rows = read_run(write_run(rows=ROWS)).rows
    assert [group.title for group in rows.groups] == [
        "Rows of the highest loss (loss, nats a trained token)",
        "The first rows as the model sees them",
    ]
    (worst,) = rows.groups[0].texts
    assert worst.title == "a.jsonl, line 1: 3, before the training 5"
    assert worst.pieces == (("Ask", False), ("</script><img src=x>\\u202e", True))
    assert rows.groups[1].texts[0].title == "a.jsonl, line 1: 4 of 9 tokens trained"
    assert rows.lengths == ((16, 6), (32, 3)) and rows.left_out == {"duplicate": 2, "too long, dropped": 1}
    # (5 x 4 + 2 x 2) / 6 = 4 and (3 x 4 + 0) / 6 = 2.
    assert rows.sources[1:] == (
        ("a.jsonl", "6", "60", "66.7%", "4.000", "2.000", "2"),
        ("b.jsonl", "3", "30", "33.3%", "4.000", "", "1"),
    )


def test_a_run_without_these_files_has_a_page(write_run):
    rows = read_run(write_run()).rows
    assert rows.groups == () and rows.sources[1][4:] == ("", "", "0")


def test_no_text_of_a_row_can_become_markup(write_run):
    page = render_board(read_board([write_run(rows=ROWS)]))
    assert page.count("</script>") == 2 and "<img" not in page and "\u202e" not in page


@pytest.mark.parametrize("name", ["rewards/margins", "margin"])
def test_margins_are_shown_under_either_name(write_run, name):
    """The empty curve of the second name took the place of the first, so that DPO's margins were not on the page."""
    run = read_run(write_run(lines=[{"step": 1, "loss": 0.7, name: 0.5, "rewards/chosen": 0.1}]))
    charts = {chart.title: chart.curves for chart in run.charts}
    assert charts["reward of the chosen answer minus that of the rejected one"]["training rows"].points == [(1, 0.5)]
    assert next(iter(charts)) == "loss"  # it is no mean over tokens


def test_rewards_are_shown_by_rule(write_run):
    line = {"step": 1, "reward": 1.0, "rewards/language/mean": 0.4, "rewards/language/std": 0.1}
    run = read_run(write_run(lines=[{**line, "eval_rewards/final_answer/mean": 0.2}]))
    (chart,) = (chart for chart in run.charts if chart.title == "mean reward by rule")
    assert {label: curve.points for label, curve in chart.curves.items()} == {
        "language": [(1, 0.4)],
        "final_answer, held-out prompts": [(1, 0.2)],
    }


def test_the_largest_page_of_a_run_is_below_two_megabytes(write_run):
    """Chinese texts as long as they are kept, 20 rows in each ranking, and 10,000 steps of every metric of a supervised run."""
    pieces = [["问" * 500, False], ["答" * 900, True]] * 3
    rows = {
        **ROWS,
        "preview": [{**SIDE, "pieces": pieces}] * 3,
        "rankings": [{"title": "t", "rows": [{"number": 0, "sides": [{**SIDE, "pieces": pieces}]}] * 20}] * 2,
    }
    names = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "eval_loss", "eval_mean_token_accuracy")
    lines = [{"step": step, **dict.fromkeys(names, step / 7)} for step in range(1, 10_001)]
    machine = [{**MACHINE[1], "step": step, "gpu_power_watts": step / 7} for step in range(1, 10_001)]
    answers = [{"origin": "fixed", "prompt": "问" * 4000, "before": "答" * 4000, "after": "答" * 4000}] * 4
    run = write_run(rows=rows, lines=lines, machine=machine, answers=answers)
    spoken = ({"step": step, "answers": [f"{step}{'答' * 4000}"] * 4} for step in range(1, 201))
    (run / EVALUATED_ANSWERS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in spoken))
    page = render_board(read_board([run]))
    assert 500_000 < len(page.encode()) < 2_000_000
