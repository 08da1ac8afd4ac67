"""Check what a micro-annealing asks for, and make the recipes of its two runs, which differ in their rows alone. Never imports torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.check.data_section import find_file
from finetune.check.recipes import load_recipe
from finetune.errors import FinetuneError, RecipeError
from finetune.files.folders import expand_home
from finetune.pipeline.dynamics.tuning import TuningSettings
from finetune.recipe.batches import read_accumulation, read_batch
from finetune.runs.resolved_recipe import ResolvedRecipe

DEFAULT_RECIPE = Path("anneal")
RUNS_FOLDER, ROWS_FOLDER = "runs", "rows"
OLD, NEW = "old", "new"
ARMS: Mapping[str, str] = {OLD: "old mixture", NEW: "with candidate"}
_OWNED = ("output", "model.checkpoint", "schedule.length", "schedule.unit", "trainer.max_steps", "data.mixture")
# The trainer evaluates, logs and saves so often in a run, unless the recipe says how often.
_LOGS, _SAVES = 50, 4


@dataclass(frozen=True)
class AnnealRequest:
    """What the user asks for.

    `candidate` are the files of the new data, and `share` their part of the tokens. `mixture` is a published one, whose files are in the
    overrides; without it `data.train` of the recipe is the old mixture. `held_out` are files to compare losses on; without them a part
    of every source is kept apart.
    """

    candidate: tuple[Path, ...]
    share: float
    tokens: int
    start: str
    output: Path
    mixture: str | None = None
    held_out: tuple[Path, ...] = ()
    recipe: Path = DEFAULT_RECIPE
    overrides: tuple[str, ...] = ()
    tuning: TuningSettings | None = None


@dataclass(frozen=True)
class AnnealPlan:
    """A checked request: the recipe that reads the rows, and the number of steps, of `step_tokens` each."""

    request: AnnealRequest
    reading: ResolvedRecipe
    steps: int
    step_tokens: int

    @property
    def tokens(self) -> int:
        """The tokens of each run: whole steps."""
        return self.steps * self.step_tokens

    def make_arm(self, name: str, rows: Path, held_out: Path) -> ResolvedRecipe:
        """Return the recipe of one of the two runs, over rows of token ids.

        Raises:
            RecipeError: it has problems.
        """
        schedule = self.reading.recipe.schedule
        given = self.reading.given
        every = max(1, self.steps // _LOGS)
        saves = math.ceil(self.steps / _SAVES / every) * every
        defaults = {
            "logging_steps": every,
            "save_strategy": "steps",
            "save_steps": saves,
            "save_total_limit": 1,
        }
        own = [f"trainer.{key}={value}" for key, value in defaults.items() if f"trainer.{key}" not in given]
        own += [
            f"schedule.length={self.tokens if schedule.unit == 'tokens' else self.steps}",
            "data={" + f"max_tokens: {self.reading.recipe.data.max_tokens}, train_on: all" + "}",
            f"output={(self.request.output / RUNS_FOLDER / name).absolute()}",
            f"model.checkpoint={self.request.start}",
        ]
        own += [f"data.train={rows.absolute()}", f"data.eval={held_out.absolute()}"]
        kept = [text for text in self.request.overrides if not text.startswith(("data.", "data="))]
        return load_recipe(self.request.recipe, [*kept, *own])

    def make_tuning(self, checkpoint: str, name: str) -> ResolvedRecipe:
        """Return the recipe of the fine-tuning of one result.

        Raises:
            RecipeError: it has problems.
        """
        tuning = self.request.tuning
        assert tuning is not None
        output = (self.request.output / "tuned" / name).absolute()
        return load_recipe(tuning.recipe, [*tuning.overrides, f"model.checkpoint={checkpoint}", f"output={output}"])


def plan_anneal(request: AnnealRequest, *, asks_tasks: bool = False) -> AnnealPlan:
    """Check a request.

    Raises:
        FinetuneError: a number is out of its range, a file or a recipe cannot be used, or nothing would be compared.
    """
    _check_numbers(request)
    for file in (*request.candidate, *request.held_out):
        if find_file(str(file), Path.cwd()) is None:
            raise FinetuneError(
                f"{file}: does not exist (looked in {Path.cwd()}); name a file, a folder or a glob with rows"
            )
    reading = _read_recipe(request)
    recipe = reading.recipe
    step_tokens = read_batch(recipe) * read_accumulation(recipe) * recipe.data.max_tokens
    plan = AnnealPlan(request, reading, math.ceil(request.tokens / step_tokens), step_tokens)
    if request.tuning is not None:
        tuned = plan.make_tuning(request.start, OLD)
        if not tuned.evaluates and not asks_tasks:
            problem = "data.eval: nothing is measured after --sft: set data.eval or data.held_out in its recipe, or name --tasks"
            raise RecipeError(str(request.tuning.recipe), [problem])
    return plan


def _check_numbers(request: AnnealRequest) -> None:
    if not request.candidate:
        raise FinetuneError("microanneal: candidate: names no file")
    if not 0 < request.share < 1:
        raise FinetuneError(f"microanneal: share: must lie between 0 and 1, such as 0.3; found {request.share:g}")
    if request.tokens < 1:
        raise FinetuneError(f"microanneal: tokens: must be 1 or more; found {request.tokens}")


def _read_recipe(request: AnnealRequest) -> ResolvedRecipe:
    """Return the recipe with the old mixture as its rows.

    Raises:
        RecipeError: it has problems, or sets what the verb sets.
    """
    keys = {text.partition("=")[0] for text in request.overrides}
    problems = [f"--set {key}: microanneal sets it itself; leave it out" for key in _OWNED if key in keys]
    if {"data", "model", "schedule", "trainer"} & keys:
        problems.append("--set: a whole section would hide what microanneal sets in it; set its keys one by one")
    if request.mixture is not None and "data.train" in keys:
        problems.append("--set data.train: --mixture names the old mixture already; leave one of them out")
    if request.mixture is None and request.recipe == DEFAULT_RECIPE and "data.train" not in keys:
        problems.append(
            "data: names no old mixture; give --mixture phase26 with your files, such as -s data.sources.code=code.jsonl, or your own "
            "with -s data.train='[{path: web.jsonl, weight: 3}, {path: code.jsonl, weight: 1}]'"
        )
    if problems:
        raise RecipeError("microanneal", problems)
    own = [f"model.checkpoint={request.start}", f"output={request.output.absolute()}"]
    own += [] if request.mixture is None else ["data.train=[]", f"data.mixture={request.mixture}"]
    if request.held_out:
        own += ["data.held_out=0", f"data.eval=[{', '.join(map(_quote, request.held_out))}]"]
    reading = load_recipe(request.recipe, [*request.overrides, *own])
    if not reading.method.is_pretraining:
        raise RecipeError(str(request.recipe), [f"method: must be anneal or pretrain; found {reading.recipe.method}"])
    if not reading.evaluates:
        problem = (
            "data.eval: no rows are held out to compare losses on; name some with --held-out, or set data.held_out"
        )
        raise RecipeError(str(request.recipe), [problem])
    return reading


def _quote(file: Path) -> str:
    text = str(expand_home(file).absolute()).replace("'", "''")
    return f"'{text}'"
