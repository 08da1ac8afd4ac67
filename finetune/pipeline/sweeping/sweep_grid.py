"""Read which values a sweep tries, and make a checked recipe for each combination and each seed. Never imports torch."""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.recipe.sections import to_plain
from finetune.runs.resolved_recipe import ResolvedRecipe

RUNS_FOLDER = "runs"
_LONGEST_VALUE, _LONGEST_FOLDER_BYTES = 40, 80
_MOST_RUNS = 1000  # a typing error must not fill the memory with recipes


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep: its setting, which is a combination of values as text, its values by key, its seed and its recipe."""

    setting: str
    values: dict[str, str]
    seed: int
    resolved: ResolvedRecipe


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep in their order, and the folder of its results."""

    recipe: str
    output: Path
    runs: tuple[SweptRun, ...]


def plan_sweep(recipe: Path, overrides: Sequence[str], seeds: int, output: Path) -> Sweep:
    """Return the runs of a sweep: every combination of the values in the overrides, each with the recipe's seed and those after it.

    All runs draw their rows by the same seed.

    Raises:
        RecipeError: a recipe has problems, two are the same, or there are no held-out rows to compare losses on.
    """
    varied = {key: values for key, values in map(_read_override, overrides) if len(values) > 1}
    _check_overrides(recipe, overrides, varied)
    count = math.prod(map(len, varied.values())) * seeds
    if count > _MOST_RUNS:
        problem = f"--seeds and the values of --set make {count:,} runs; a sweep takes at most {_MOST_RUNS:,}"
        raise RecipeError(str(recipe), [problem])
    fixed = [text for text in overrides if _read_override(text)[0] not in varied]
    given = {key: ",".join(values) for key, values in map(_read_override, overrides) if key != "seed"}
    names = _name_keys(tuple(given))
    runs: list[SweptRun] = []
    combinations = [dict(zip(varied, one, strict=True)) for one in itertools.product(*varied.values())]
    for values, setting in zip(combinations, _name_settings(combinations), strict=True):
        own = [*fixed, *(f"{key}={value}" for key, value in values.items())]
        # Keys of one value are part of the name: a sweep with fewer values then finds the runs of one with more.
        folder = output / RUNS_FOLDER / _name_folder({**given, **values}, names)
        runs += _repeat(recipe, setting, values, own, seeds, folder)
    _check_differences(recipe, runs)
    return Sweep(str(recipe), output, tuple(runs))


def _repeat(
    recipe: Path, setting: str, values: dict[str, str], overrides: list[str], seeds: int, folder: Path
) -> list[SweptRun]:
    """Return the runs of one setting."""
    try:
        first = load_recipe(recipe, overrides).recipe
        rows = first.seed if first.data.seed is None else first.data.seed
        runs = []
        for seed in range(first.seed, first.seed + seeds):
            own = [f"seed={seed}", f"data.seed={rows}", f"output={folder.absolute()}-seed{seed}"]
            runs.append(SweptRun(setting, values, seed, load_recipe(recipe, [*overrides, *own])))
    except RecipeError as error:
        named = f"{error.source}: " if error.source != str(recipe) else ""  # an override that is not YAML
        problems = [f"{named}{problem}" for problem in error.problems]
        raise RecipeError(f"{recipe} with {setting}" if values else str(recipe), problems) from error
    if not first.data.eval and not first.data.held_out:
        problem = (
            "data.eval: a sweep compares held-out losses, and no rows are held out; set data.eval or data.held_out"
        )
        raise RecipeError(str(recipe), [problem])
    return runs


def split_values(text: str) -> list[str]:
    """Return the values between commas; commas within brackets, braces or quotes that a value begins with separate none."""
    values, start, depth, quote, place = [], 0, 0, "", 0
    while place < len(text):
        letter, before = text[place], text[start:place].rstrip()
        if quote:
            if letter == "\\" and quote == '"':
                place += 1
            elif letter == quote and not (quote == "'" and text[place + 1 : place + 2] == "'"):
                quote = ""
            elif letter == quote:
                place += 1
        elif letter in "'\"" and (not before or (depth and before[-1] in ",[{:")):
            quote = letter
        elif letter in "[{" and (depth or not before):
            depth += 1
        elif letter in "]}" and depth:
            depth -= 1
        elif letter == "," and not depth:
            values.append(text[start:place])
            start = place + 1
        place += 1
    return [*values, text[start:]]


def _read_override(text: str) -> tuple[str, list[str]]:
    key, equals, value = text.partition("=")
    return key, [one.strip() for one in split_values(value)] if equals else [value]


def _check_overrides(recipe: Path, overrides: Sequence[str], varied: dict[str, list[str]]) -> None:
    """Check what only a sweep refuses.

    Raises:
        RecipeError: a key is the sweep's own, is given twice, or has an empty value.
    """
    keys = [text.partition("=")[0] for text in overrides]
    problems = []
    if "output" in keys:
        problems.append("--set output: each run of a sweep has a folder of its own, below that of -o; leave it out")
    if "seed" in varied:
        problems.append("--set seed: give one, the first; --seeds says how many there are")
    for key in dict.fromkeys(key for key in keys if keys.count(key) > 1):
        values = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == key]
        problems.append(f"--set {key}: is given twice; write all its values in one: {key}={','.join(values)}")
    for key, values in varied.items():
        if "" in values:
            problems.append(
                f"--set {key}={','.join(values)}: a value between two commas is empty; a comma within a value needs quotes or brackets"
            )
    if problems:
        raise RecipeError(str(recipe), problems)


def _check_differences(recipe: Path, runs: Sequence[SweptRun]) -> None:
    known: list[tuple[object, SweptRun]] = []
    for run in runs:
        plain = {key: value for key, value in to_plain(run.resolved.recipe).items() if key != "output"}
        same = next((other for content, other in known if content == plain), None)
        if same is not None:
            problem = f"--set: {same.setting} and {run.setting} are the same recipe; leave one of them out"
            raise RecipeError(str(recipe), [problem])
        known.append((plain, run))


def _name_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the whole key where two end the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _shorten(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"


def _name_settings(combinations: Sequence[dict[str, str]]) -> list[str]:
    """Return a name of each combination; long values are cut, unless two names would then be the same."""
    names = _name_keys(tuple(combinations[0]))
    short = [{key: _shorten(value) for key, value in values.items()} for values in combinations]
    settings = [_name_setting(values, names) or "as the recipe says" for values in short]
    return settings if len(set(settings)) == len(settings) else [_name_setting(one, names) for one in combinations]


def _name_setting(values: dict[str, str], names: dict[str, str]) -> str:
    return ", ".join(f"{names[key]}={value}" for key, value in values.items())


def _name_folder(values: dict[str, str], names: dict[str, str]) -> str:
    """Return a name that stays when values are added to the sweep or taken away, and that no other setting has."""
    if not values:
        return "recipe"
    short = {key: _shorten(value) for key, value in values.items()}
    plain = re.sub(r"[^\w.=+-]+", "-", _name_setting(short, names)).encode()[:_LONGEST_FOLDER_BYTES]
    content = "\n".join(f"{key}={value}" for key, value in sorted(values.items()))
    return f"{plain.decode(errors='ignore').strip('-.')}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"
