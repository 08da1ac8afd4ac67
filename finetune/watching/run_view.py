"""Read run directories into what their page shows; a run that is still training is read as far as it is."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.errors import FinetuneError
from finetune.files.folders import expand_home
from finetune.files.json_files import explain_damage, read_json
from finetune.runs.run_files import RECORD_FILE, name_inner_run, read_metrics
from finetune.watching.answers_view import Answer, cut_text, read_answers, read_completions
from finetune.watching.cautions import Caution, collect_series, is_number, list_cautions
from finetune.watching.machine_view import list_machine_figures, read_machine
from finetune.watching.panels import list_panels
from finetune.watching.rows_view import RowsView, read_rows_view

# More points than a curve has pixels show nothing more.
_MOST_POINTS = 600
_FEWEST_FOR_TREND, _TREND_POINTS = 120, 40


@dataclass(frozen=True)
class Curve:
    """One curve as points `(step, value)`.

    `trend` holds the mean of each stretch of steps, where there are many points, and `errors` the standard errors of some points.
    """

    points: Sequence[tuple[int, float]]
    trend: Sequence[tuple[int, float]]
    errors: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Chart:
    """One panel of a run: a title, and its curves by their labels."""

    title: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class RunView:
    """What the page shows of a run.

    `share` is the part of the run that is done, from 0 to 1, or None where this is not known. `figures` are names and values for
    a person, `recipe` maps each key to its value as text, and `completions` are the newest answers of an online method.
    """

    name: str
    status: str
    step: int
    share: float | None
    figures: Mapping[str, str]
    charts: tuple[Chart, ...]
    cautions: tuple[Caution, ...]
    notes: tuple[str, ...]
    answers: tuple[Answer, ...]
    completions: tuple[Answer, ...]
    rows: RowsView
    recipe: Mapping[str, str]


@dataclass(frozen=True)
class Board:
    """All runs of a page, and the keys in which their recipes differ, each with the value of every run.

    `left_out` says of each other named path why it is not shown.
    """

    runs: tuple[RunView, ...]
    differences: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def read_board(folders: Iterable[Path]) -> Board:
    """Return the page of some runs; a run that is named twice is shown once, and what is no readable run is left out.

    Raises:
        FinetuneError: folders were named, and none of them is a run directory that can be read.
    """
    found: dict[Path, RunView] = {}
    faults: dict[Path, str] = {}
    for folder in folders:
        place = Path(os.path.realpath(expand_home(folder)))
        try:
            found[place] = read_run(folder)
        except FinetuneError as error:
            faults[place] = str(error)
        except OSError as error:
            faults[place] = f"{folder}: cannot be read ({error.strerror})"
    if faults and not found:
        beginning = [f"none of the {len(faults)} named paths can be shown:"] if len(faults) > 1 else []
        raise FinetuneError("\n  ".join([*beginning, *faults.values()]))
    runs = tuple(
        replace(run, name=cut_text(name)) for name, run in zip(_name_apart(list(found)), found.values(), strict=True)
    )
    keys = dict.fromkeys(key for run in runs for key in run.recipe if key != "output")
    differences = {key: tuple(run.recipe.get(key, "") for run in runs) for key in keys}
    differences = {key: values for key, values in differences.items() if len(set(values)) > 1}
    return Board(runs, differences, tuple(cut_text(fault) for fault in faults.values()))


def check_named(folders: Iterable[Path]) -> None:
    """Refuse a path that leads nowhere: a list of the shell holds none, so it is mistyped.

    Raises:
        FinetuneError: there is no such file or folder.
    """
    for folder in folders:
        if not os.path.lexists(expand_home(folder)):
            raise FinetuneError(f"{folder}: there is no such file or folder; name the output of a recipe")


def _name_apart(places: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells all of them apart."""
    for length in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = [str(Path(*place.parts[-length:])) for place in places]
        if len(set(names)) == len(names):
            return names
    return []


def read_run(folder: Path) -> RunView:
    """Return what the page shows of one run.

    Raises:
        FinetuneError: the folder is no run directory, or its record is damaged.
    """
    folder = expand_home(folder)
    record = read_json(folder / RECORD_FILE)
    if not isinstance(record, dict):
        name = name_inner_run(folder) or "name the output of a recipe"
        raise FinetuneError(f"{folder}: is no run directory, for it has no {RECORD_FILE}; {name}")
    with explain_damage(folder / RECORD_FILE):
        return _view_run(folder, record)


def _view_run(folder: Path, record: Mapping[str, Any]) -> RunView:
    lines = read_metrics(folder)
    recipe = dict(_flatten(record.get("recipe", {})))
    step = lines[-1]["step"] if lines else 0
    result = record.get("result") or {}
    data = record.get("data") or {}
    machine = read_machine(folder, record.get("planned_bytes"))
    return RunView(
        name=cut_text(folder.resolve().name),
        status=str(record.get("status", "")),
        step=max(step, int(result.get("steps", 0))),
        share=1.0 if result else _find_share(recipe, lines),
        figures={
            **dict(_list_figures(data, result, recipe)),
            **dict(_describe_held_out(lines, result)),
            **dict(list_machine_figures(machine, is_running=not result)),
        },
        charts=tuple(_draw_charts([*lines, *machine])),
        cautions=list_cautions(lines),
        notes=tuple(cut_text(str(note)) for note in (*data.get("notes", ()), *result.get("warnings", ()))),
        answers=tuple(read_answers(folder)),
        completions=tuple(read_completions(folder)),
        rows=read_rows_view(folder, data),
        recipe=recipe,
    )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif value not in (None, [], {}, ""):
            yield f"{prefix}{key}", cut_text(str(value))


def _find_share(recipe: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the part of the run that is done, by its steps or its epochs."""
    if not lines:
        return 0.0
    for unit, key in (("step", "trainer.max_steps"), ("epoch", "trainer.num_train_epochs")):
        if is_number(lines[-1].get(unit)) and float(recipe.get(key, 0)) > 0:
            return min(1.0, float(lines[-1][unit]) / float(recipe[key]))
    return None


def _list_figures(
    data: Mapping[str, Any], result: Mapping[str, Any], recipe: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield names and values of what is trained, of the rows, and of the result."""
    yield "method", recipe.get("method", "")
    yield "base checkpoint", recipe.get("model.checkpoint", "")
    for name, split in (("rows for training", data.get("train")), ("rows held out", data.get("evaluation"))):
        if split:
            yield name, f"{split['rows']:,}"
    if train := data.get("train"):
        yield "trained tokens", f"{train['trained_tokens']:,} of {train['tokens']:,}"
        yield "median / longest row", f"{train['median']:,} / {train['longest']:,} tokens"
        for name in ("dropped", "truncated"):
            if train[name]:
                yield f"rows {name}", f"{train[name]:,}"
    for name, key, form in _RESULTS:
        if is_number(result.get(key)):
            yield name, form.format(result[key])
    if result.get("seconds") and result.get("tokens"):
        yield "tokens a second", f"{result['tokens'] / result['seconds']:,.0f}"


def _describe_held_out(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the held-out loss of the result, or the newest one of a running run, with its standard error."""
    losses = [line for line in lines if is_number(line.get("eval_loss"))]
    measured = next((line for line in losses[::-1] if line["eval_loss"] == result.get("eval_loss")), None)
    if (line := measured or (losses[-1] if losses and not result else None)) is not None:
        error = f" ± {line['eval_loss_stderr']:.3f}" if is_number(line.get("eval_loss_stderr")) else ""
        yield _HELD_OUT, f"{line['eval_loss']:.3f}{error}"


_HELD_OUT = "held-out loss"
_RESULTS = (
    ("training loss", "train_loss", "{:.3f}"),
    (_HELD_OUT, "eval_loss", "{:.3f}"),
    ("reward", "train_reward", "{:.3f}"),
    ("held-out reward", "eval_reward", "{:.3f}"),
    ("weights of step", "best_step", "{:,}"),
    ("seconds", "seconds", "{:,.0f}"),
)


def _draw_charts(lines: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    series = collect_series(lines)
    for panel in list_panels(series):
        # Methods name some metrics differently, so two names may stand for one curve; a run logs one of them.
        curves = {
            label: _draw_curve(
                [(step, value / panel.unit) for step, value in series[name]], series.get(f"{name}_stderr")
            )
            for name, label in panel.curves.items()
            if name in series
        }
        if curves:
            yield Chart(panel.title, curves)


def _draw_curve(points: Sequence[tuple[int, float]], errors: Sequence[tuple[int, float]] | None) -> Curve:
    return Curve(thin_out(points), find_trend(points), (errors or ())[-_MOST_POINTS:])


def thin_out(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most 600 points: of each stretch of steps the lowest and the highest, and always the first and the last."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    kept = {points[0], points[-1]}
    for stretch in _split(points[1:-1], _MOST_POINTS // 2 - 1):
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def find_trend(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the mean step and the mean value of each of 40 stretches, or nothing where there are few points."""
    if len(points) < _FEWEST_FOR_TREND:
        return []
    stretches = _split(points, _TREND_POINTS)
    return [(round(fmean(step for step, _ in part)), fmean(value for _, value in part)) for part in stretches]


def _split(points: Sequence[tuple[int, float]], count: int) -> list[Sequence[tuple[int, float]]]:
    """Split points into so many stretches of nearly the same length."""
    return [points[place * len(points) // count : (place + 1) * len(points) // count] for place in range(count)]
