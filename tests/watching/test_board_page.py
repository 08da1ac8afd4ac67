"""The page of runs: what it says, that it needs nothing else, and that no text of a run can become mark-up."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from finetune.cli.main import main
from finetune.errors import FinetuneError
from finetune.runs.run_files import EVALUATED_ANSWERS_FILE, REPORT_FILE
from finetune.watching.board_page import render_board, write_board_page, write_report
from finetune.watching.run_view import find_trend, read_board, read_run, thin_out

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp\x1b[31m"
RESULT = {"steps": 20, "train_loss": 2.0, "eval_loss": None, "seconds": 10.0, "tokens": 1000}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def read_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_running_run_is_read_as_far_as_it_is(write_run):
    run = read_run(write_run())
    assert (run.name, run.status, run.step, run.share) == ("run", "running", 10, 0.5)
    assert run.figures["trained tokens"] == "50 of 90" and run.figures["rows dropped"] == "1"
    loss = run.charts[0].curves["training rows"]
    assert loss.points[0] == (1, 2.9) and loss.points[-1] == (10, 2.0) and loss.trend == []
    assert [chart.title for chart in run.charts] == ["loss (nats per trained token)", "learning rate"]


def test_a_finished_run_shows_its_result(write_run):
    run = read_run(write_run(result=RESULT))
    assert (run.share, run.step) == (1.0, 20)
    assert run.figures["training loss"] == "2.000" and run.figures["tokens a second"] == "100"
    assert "held-out loss" not in run.figures


def test_half_a_line_is_left_out(write_run):
    run = write_run(steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_run(run).step == 3


def test_several_runs_show_what_differs(write_run):
    board = read_board([write_run("one"), write_run("two", rate=0.2)])
    assert board.differences == {"trainer.learning_rate": ("0.1", "0.2")}


def test_of_a_shells_list_the_runs_are_shown_and_the_rest_is_named(write_run, tmp_path, capsys):
    """`finetune watch runs/*` ended at the first path of the list that was no run."""
    write_run("one")
    write_run("two", rate=0.2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "group").mkdir()
    shutil.copytree(tmp_path / "one", tmp_path / "group" / "inside")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    paths, page = sorted(map(str, tmp_path.iterdir())), tmp_path / "page.html"
    with pytest.raises(SystemExit) as stopped:
        main(["watch", "--json", *paths, "-o", str(page)])
    assert stopped.value.code == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    assert [fault.split(":")[0].removeprefix(f"{tmp_path}/") for fault in left_out] == [
        "bad/run.json",
        "dangling",
        "empty",
        "group",
        "loop",
        "notes.txt",
    ]
    assert "is not valid JSON" in left_out[0] and left_out[3].endswith(f"such as {tmp_path}/group/inside")
    data = read_data(page.read_text())
    assert [run["name"] for run in data["runs"]] == ["one", "two"] and data["left_out"] == left_out


def test_a_list_without_a_run_and_a_mistyped_path_are_refused(write_run, tmp_path):
    run, page = write_run(), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FinetuneError, match=r"^none of the 2 named paths can be shown:\n  .*empty: .*\n  .*notes.txt: "
    ):
        write_board_page([tmp_path / "empty", tmp_path / "notes.txt"], page)
    with pytest.raises(FinetuneError, match="tow: there is no such file or folder"):
        write_board_page([run, tmp_path / "tow"], page)
    assert not page.exists()


def test_long_curves_keep_their_extremes_and_their_means():
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[5000] = (5000, 99.0)
    thin = thin_out(points)
    assert len(thin) <= 600 and thin[0] == points[0] and thin[-1] == points[-1] and (5000, 99.0) in thin
    trend = find_trend([(step, 1.0 * step) for step in range(120)])
    assert len(trend) == 40 and trend[:2] == [(1, 1.0), (4, 4.0)]
    assert find_trend(points[:119]) == [] and thin_out(points[:600]) == points[:600]


def test_the_page_needs_nothing_else_and_runs_only_its_own_script(write_run):
    page = render_board(read_board([write_run(steps=10_000)]))
    assert len(page.encode()) < 2_000_000
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in page and "connect-src" not in page
    assert "connect-src 'self'" in render_board(read_board([write_run()]), seconds=1.0)


def test_no_text_of_a_run_can_become_markup(write_run):
    answers = [{"origin": HOSTILE, "prompt": HOSTILE, "before": HOSTILE, "after": None}]
    page = render_board(read_board([write_run(answers=answers, notes=[HOSTILE])]))
    assert page.count("</script>") == 2 and "<img" not in page and "\u202e" not in page and "\x1b" not in page
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    (run,) = read_data(page)["runs"]
    assert run["notes"] == [shown] and run["answers"][0]["before"] == shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(write_run, tmp_path):
    answers = [{"origin": "fixed", "prompt": HOSTILE, "before": "", "after": "我是玉兰"}]
    page = tmp_path / "page.html"
    runs = [write_run("one", 10_000, answers=answers), write_run("two", 5, rate=0.2)]
    spoken = ((2, ""), (4, ""), (6, HOSTILE), (8, "我是玉兰"))
    lines = [json.dumps({"step": step, "answers": [text]}) for step, text in spoken]
    (runs[0] / EVALUATED_ANSWERS_FILE).write_text("\n".join([*lines, ""]))
    page.write_text(render_board(read_board(runs)), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert drawn.count("<polyline") == 6  # two panels of two runs, and the trend of the long one in each
    assert "我是玉兰" in drawn and "&lt;img src=x" in drawn and "<img" not in drawn
    course = re.search('<table class="course">(.*?)</table>', drawn)[1]
    steps = re.findall("<th>(.*?)</th><td[^>]*>(.*?)</td>", course)
    assert [name for name, _ in steps] == ["steps 2 to 4", "step 6", "step 8"]
    assert [text[:9] for _, text in steps] == ["as before", "&lt;/scri", "as after"]
    assert "trainer.learning_rate" in drawn and "What differs in the recipes" in drawn


def test_a_run_leaves_its_report(train):
    page = (train("run") / REPORT_FILE).read_text(encoding="utf-8")
    (run,) = read_data(page)["runs"]
    assert (run["status"], run["step"], run["share"]) == ("finished", 4, 1.0) and run["charts"]


def test_the_command_writes_a_page_once(write_run, tmp_path, capsys):
    run, page = write_run(), tmp_path / "page.html"
    for status in (0, 2):
        with pytest.raises(SystemExit) as ended:
            main(["watch", str(run), "-o", str(page)])
        assert ended.value.code == status
    assert "exists already" in capsys.readouterr().err and page.read_text().startswith("<!doctype html>")


def test_runs_of_one_name_are_told_apart(write_run, tmp_path):
    """Two sweeps have runs of the same names, and both curves had one label."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    runs = [write_run("a/one"), write_run("b/one", rate=0.2), write_run("b/two", rate=0.3)]
    names = [run.name for run in read_board([*runs, runs[0] / ".." / "one"]).runs]
    assert names == ["a/one", "b/one", "b/two"]
    assert [run.name for run in read_board(runs[1:]).runs] == ["one", "two"]


DAMAGED = {
    "run.json": ({"data": 3}, {"result": "x"}, {"data": {"train": {"rows": 1}}}, {"recipe": [1]}),
    "answers.json": (3, [1], {"a": 1}),
    "row_losses.json": (
        [1],
        {"preview": [3]},
        {"rankings": [{"rows": [{"number": 9}], "title": "", "x": 1}], "rows": []},
    ),
}


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, several in DAMAGED.items() for one in several])
def test_a_damaged_file_is_named(write_run, name, content, caplog):
    """They were tracebacks, also at the end of a run whose weights were written."""
    run = write_run()
    (run / name).write_text(json.dumps(content))
    with pytest.raises(FinetuneError, match=rf"{name}: is not as it was written"):
        read_run(run)
    write_report(run)
    assert f"{name}: is not as it was written" in caplog.text and not (run / REPORT_FILE).exists()


def test_half_characters_are_shown_and_written(write_run, tmp_path):
    answers = [{"origin": "a\udcff", "prompt": "\ud800", "before": "", "after": None}]
    page = tmp_path / "page.html"
    write_board_page([write_run(answers=answers)], page)
    (answer,) = read_data(page.read_text(encoding="utf-8"))["runs"][0]["answers"]
    assert (answer["origin"], answer["prompt"]) == ("a\\udcff", "\\ud800")


def test_what_is_no_run_is_refused(write_run, tmp_path):
    with pytest.raises(FinetuneError, match=r"is no run directory, .*; name the output of a recipe"):
        read_run(tmp_path)
    run = write_run()
    with pytest.raises(FinetuneError, match=rf"is no run directory, .*; name one inside, such as {run}"):
        read_run(tmp_path)
    (run / "run.json").write_text("[]")
    with pytest.raises(FinetuneError, match="is no run directory"):
        read_run(run)
    (run / "run.json").write_text("{")
    with pytest.raises(FinetuneError, match="is not valid JSON"):
        read_run(run)
