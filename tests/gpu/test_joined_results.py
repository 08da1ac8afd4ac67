"""The results of gpu.py: several calls are joined, what died keeps what it has, and the table says what was measured of what."""

import importlib
import json
import re
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICE = {"card": "Card A", "memory": 24 * 2**30, "cuda": "13.0", "python": "3.12.3"} | dict.fromkeys(
    ("torch", "transformers", "peft", "trl", "bitsandbytes"), "1.0"
)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Let the tests import the modules of the measurement."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def make_store(tmp_path):
    """Return a function that opens the results of a call; each has files of lines of its own, as on a machine that is lent anew."""
    store, calls = importlib.import_module("gpu_parts.store"), iter(range(9))
    (tmp_path / "out").mkdir()

    def make(written, sources="one", device=DEVICE, keep=False):
        found = store.Store(tmp_path / "out", tmp_path / f"lines{next(calls)}", sources, device)
        found.begin(written, keep)
        return found

    return make


def add(store, name, *rows):
    with (store.lines / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    store.save(None, {})


def read_names(tmp_path, name):
    return [row["name"] for row in json.loads((tmp_path / "out" / "gpu.json").read_text())[name]]


MEMORY = {"name": "case", "card_gib": 6, "allocated": 3 * 2**30, "reserved": 4 * 2**30, "left": 2**30}


def test_a_later_call_keeps_what_it_does_not_measure_again(make_store, tmp_path):
    add(make_store(["memory"]), "memory", MEMORY)
    add(make_store(["export"], sources="two"), "export", {"name": "chat", "tokens": 5})
    assert read_names(tmp_path, "memory") == ["case"]
    assert read_names(tmp_path, "export") == ["chat"]


def test_the_same_case_measured_again_replaces_its_row(make_store, tmp_path):
    add(make_store(["memory"]), "memory", MEMORY, {**MEMORY, "name": "other"})
    add(make_store(["memory"]), "memory", {**MEMORY, "allocated": 1})
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["memory"]
    assert [(row["name"], row["allocated"]) for row in rows] == [("case", 1), ("other", 3 * 2**30)]


@pytest.mark.parametrize(("keep", "expected"), [(False, ["new"]), (True, ["case", "new"])])
def test_rows_of_another_state_of_the_kit_are_kept_only_if_asked(make_store, tmp_path, keep, expected):
    add(make_store(["memory"]), "memory", MEMORY, {"name": "failed", "error": "no"})
    add(make_store(["memory"], sources="two", keep=keep), "memory", {**MEMORY, "name": "new"})
    assert read_names(tmp_path, "memory") == expected


def test_results_of_another_card_are_not_mixed(make_store, tmp_path):
    add(make_store(["memory"]), "memory", MEMORY)
    add(make_store(["export"], device={**DEVICE, "card": "Card B"}), "export", {"name": "chat"})
    assert read_names(tmp_path, "memory") == []
    earlier = json.loads((tmp_path / "out" / "gpu_Card_A.json").read_text())
    assert [row["name"] for row in earlier["memory"]] == ["case"]


@pytest.mark.parametrize(
    "damaged",
    ["{", "[]", "{}", '{"device": {"card": 1}, "parts": {}}', json.dumps({"device": DEVICE, "parts": {}, "tests": 5})],
)
def test_damaged_results_are_named_and_kept(make_store, tmp_path, damaged):
    (tmp_path / "out" / "gpu.json").write_text(damaged)
    with pytest.raises(SystemExit, match=r"gpu\.json: .*; restore .*, or move it away"):
        make_store(["memory"])
    assert (tmp_path / "out" / "gpu.json").read_text() == damaged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wheels", "empty", "--rehearse"], "empty: there are no wheels; benchmarks/gpu_wheels.py collects them"),
        (["--keep", "file"], "--keep file: cannot be made a folder: File exists"),
        (["--minutes", "nan"], "argument --minutes: must be a number above 0; found 'nan'"),
        (["--patience", "0"], "argument --patience: must be a number above 0; found '0'"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_message(tmp_path, monkeypatch, capsys, options, message):
    """`--minutes nan` measured without end; the others ended in a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as left:
        importlib.import_module("gpu").main()
    assert message in f"{left.value.code} {capsys.readouterr().err}"


def test_wheels_without_a_library_for_the_card_are_refused(tmp_path):
    """The folder was made, and the card would have had no kernels."""
    wheels = importlib.import_module("gpu_wheels")
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        for name in ("cpu", "cuda126", "cuda130"):
            content.writestr(f"bitsandbytes/libbitsandbytes_{name}.so", "library")
    with pytest.raises(SystemExit, match=r"--cuda 999: .* has no library for it; it has 126, 130"):
        wheels.keep_libraries(wheel, "999")
    wheels.keep_libraries(wheel, "130")
    assert [name[-11:] for name in zipfile.ZipFile(wheel).namelist()] == ["ytes_cpu.so", "_cuda130.so"]


def test_half_a_line_of_a_part_that_was_stopped_is_left_out(tmp_path):
    lines = importlib.import_module("gpu_parts.lines")
    (tmp_path / "rows").write_text('{"name": "whole"}\n{"name": "ha')
    assert lines.read_lines(tmp_path / "rows") == [{"name": "whole"}]


def test_what_is_known_is_not_measured_again(tmp_path):
    lines, file = importlib.import_module("gpu_parts.lines"), tmp_path / "rows"
    lines.write_lines(file, [{"name": "known", "value": 1}, {"name": "failed", "error": "no"}])
    for name in ("known", "failed", "new"):
        lines.record(file, name, lambda: {"value": 2}, only_missing=True)
    assert {row["name"]: row["value"] for row in lines.read_lines(file)} == {"known": 1, "failed": 2, "new": 2}


def speed(program, setting, **values):
    """Return a row of a program that trains 1,000 tokens a step of half a second."""
    row = {
        "name": f"{program}: {setting}",
        "setting": setting,
        "seconds": 0.5,
        "step_tokens": 1000,
        "expected_tokens": 1000,
    }
    measured = {"tokens_per_second": 2000.0, "flops_per_second": 3e12, "attainable_flops": 12e12, "allocated": 2**30}
    return row | measured | values


def test_the_table_has_ratios_and_shares_only_of_what_is_alike():
    report = importlib.import_module("gpu_parts.report")
    results = {
        "device": DEVICE,
        "parts": {"speed": {"status": None, "seconds": 50, "measured": "2026-11-27 10:00", "sources": "one"}},
        "tests": [{"name": "a", "outcome": "passed"}, {"name": "b", "outcome": "failed"}],
        "memory": [MEMORY, {"name": "large", "card_gib": 80, "skipped": "this card has 24 GiB"}],
        "plans": [{"name": "case", "allocated": 2 * 2**30, "peak": 5 * 2**30}],
        "speed": [speed("ours", "short", kernels=7, busy_seconds=0.25), {"name": "ours: long", "error": "no memory"}],
        "auto": [speed("ours, speed auto", "short", speed={"ways": ["a", "b"], "reason": "both help"})],
        "plain": [speed("plain TRL", "short", tokens_per_second=1600.0)],
        "unsloth": [
            speed("Unsloth", "short", tokens_per_second=2500.0),
            speed("Unsloth", "packed", step_tokens=250),
            {"name": "Unsloth: versions", "versions": {"trl": "0.9"}},
        ],
        "roomy": [speed("ours, no checkpointing", "packed")],
    }
    table = report.describe(results).splitlines()
    assert "Tests: 1 passed, 1 failed: `b` failed." in table
    assert "| case | 6 | 2.00 | 2.00 | +0.0% | 3.00 | 5.00 |" in table
    assert "| large | 80 | not measured: this card has 24 GiB |||||" in table
    assert "| short | ours | 2,000 | 1.25 | 0.80 | 3 | 25% | 50% | 7 | 1.00 |" in table
    assert "| short | ours, speed auto (a, b) | 2,000 | 1.25 | 0.80 | 3 | 25% |  |  | 1.00 |" in table
    assert "- `model.speed: auto` of ours, speed auto: short: both help." in table
    assert "| long | ours | no memory ||||||||" in table
    assert "| packed | ours, no checkpointing | 2,000 |  |  | 3 | 25% |  |  | 1.00 |" in table
    took = "packed (took 250 tokens a step in place of 1,000)"
    assert f"| {took} | Unsloth | 2,000 |  |  | 3 | 25% |  |  | 1.00 |" in table
    assert "Unsloth with trl 0.9." in table
    assert "Parts: speed (ran out of time after 50 s, 2026-11-27 10:00)" in table


def make_part(running, tmp_path, name, code, limit=20.0, waits=False):
    command = (sys.executable, "-c", f"import pathlib, sys, time; mark = pathlib.Path({str(tmp_path)!r})\n{code}")
    return running.Part(name, (command,), limit, (), waits=waits)


def test_a_part_that_waits_starts_early_and_measures_in_its_turn(tmp_path):
    running, ended = importlib.import_module("gpu_parts.running"), {}
    # The first ends only after the second has started; the second fails if it measures before the first has ended.
    first = "while not (mark / 'started').exists(): time.sleep(0.01)\n(mark / 'first').touch()"
    second = (
        "(mark / 'started').touch(); sys.stdin.read()\nassert (mark / 'first').exists()\nprint('said'); sys.exit(3)"
    )
    parts = [
        make_part(running, tmp_path, "first", first),
        make_part(running, tmp_path, "second", second, waits=True),
        make_part(running, tmp_path, "third", "time.sleep(60)", limit=0.3),
    ]
    place = running.Place(tmp_path, {}, tmp_path, tmp_path / "all.log")

    def save(part, end):
        if part is not None:
            ended[part.name] = end["status"]

    running.run_parts(parts, place, time.monotonic() + 30, save)
    assert ended == {"first": 0, "second": 3, "third": None}
    assert "== second\nsaid\n" in (tmp_path / "all.log").read_text()


@pytest.mark.parametrize(("card_gib", "first", "processes"), [(80, "checks", 6), (24, "tests", 2)])
def test_a_large_card_is_shared_by_what_measures_no_time(tmp_path, card_gib, first, processes):
    """The checkpoint is made beside the tests, which do not need it; three processes measure memory on a large card."""
    gpu, size = importlib.import_module("gpu"), card_gib * 2**30
    parts = gpu.add_base(gpu.join_checks(gpu.list_parts(tmp_path, [], size, {}), size), ("make",))
    assert (parts[0].name, len(parts[0].commands), parts[0].commands[0]) == (first, processes, ("make",))
    written = [name for part in parts for name in part.writes]
    assert sorted(written) == sorted(importlib.import_module("gpu_parts.store").LISTS)
    only_speed = [part for part in parts if part.name == "speed"]
    assert [part.name for part in gpu.add_base(only_speed, ("make",))] == ["base", "speed"]


def test_only_one_process_measures_a_case(tmp_path):
    memory, cases = importlib.import_module("gpu_parts.memory"), importlib.import_module("gpu_parts.cases")
    assert [memory.claim(tmp_path / "claims", case) for case in (*cases.CASES, *cases.CASES)] == [
        *[True] * len(cases.CASES),
        *[False] * len(cases.CASES),
    ]


def test_every_tier_of_a_gpu_is_measured_as_on_its_card():
    cases = importlib.import_module("gpu_parts.cases").CASES
    tiers = {path.stem for path in (ROOT / "recipes" / "tiers").glob("*gb.yaml") if path.stem[0].isdigit()}
    assert {case.recipe: case.card_gib for case in cases if case.recipe.startswith("tiers/")} == {
        f"tiers/{tier}": int(tier.removesuffix("gb")) for tier in tiers
    }


def test_a_wheel_is_made_smaller(tmp_path):
    wheels = importlib.import_module("gpu_wheels")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        for name in ("some/a.py", "studio/page.js"):
            wheel.writestr(name, "text")
    wheels.keep_files(tmp_path / "some.whl", lambda name: not name.startswith(wheels.UNSLOTH_PROGRAM))
    assert zipfile.ZipFile(tmp_path / "some.whl").namelist() == ["some/a.py"]


def test_the_readme_repeats_the_measured_memory():
    """Only where the results are of the card that the README names: who measures another one is not told off."""
    results = json.loads((ROOT / "benchmarks" / "gpu.json").read_text(encoding="utf-8"))
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("| GPU memory, planned / measured on an "))
    if results["device"]["card"] not in line:
        pytest.skip("the README names another card")
    plans = {row["name"]: row["allocated"] for row in results["plans"] if "allocated" in row}
    pairs = {
        f"{plans[row['name']] / 2**30:.2f} / {(row['allocated'] - row['left']) / 2**30:.2f}"
        for row in results["memory"]
        if "allocated" in row and row["name"] in plans
    }
    said = set(re.findall(r"\d+\.\d\d / \d+\.\d\d", line))
    assert len(said) == 8
    assert said <= pairs
