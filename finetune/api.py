"""The public functions of `import finetune`. Each does what a verb of the command line does, and returns what `--json` prints."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from finetune.api_arguments import (
    require_choice,
    require_count,
    require_files,
    require_flag,
    require_list,
    require_name,
    require_number,
    require_path,
    require_text,
)
from finetune.check.recipes import load_recipe
from finetune.checkpoints.finding import find_checkpoint
from finetune.data.preview.preview import Preview, preview_rows
from finetune.errors import ArgumentError
from finetune.evaluation.asking.engines import read_engine
from finetune.evaluation.pairs import PairScores, evaluate_pairs, hold_pairs
from finetune.evaluation.tasks.run_tasks import evaluate_tasks as ask_model
from finetune.evaluation.tasks.task_forms import Protocol
from finetune.evaluation.tasks.task_options import read_task_settings
from finetune.evaluation.tasks.task_results import Evaluation
from finetune.evaluation.token_loss import Scores, evaluate_path
from finetune.exporting.gguf.llama_cpp import make_prover
from finetune.exporting.merge import export_result
from finetune.exporting.proof import ExportReport
from finetune.exporting.verify import LogitVerifier
from finetune.files.sizes import parse_memory, parse_size
from finetune.growth.growth_report import Growth
from finetune.models.opening import LoadedModel
from finetune.models.opening import open_model as open_named_model
from finetune.pipeline.dynamics.dynamics_inputs import DynamicsSettings, Keep
from finetune.pipeline.dynamics.run_dynamics import run_dynamics
from finetune.pipeline.dynamics.tuning import TuningSettings
from finetune.pipeline.memory_ladder import train_on_device
from finetune.pipeline.microanneal.anneal_plan import DEFAULT_RECIPE, AnnealRequest, plan_anneal
from finetune.pipeline.microanneal.anneal_results import AnnealReport
from finetune.pipeline.microanneal.anneal_run import run_microanneal
from finetune.pipeline.sweeping.sweep_grid import plan_sweep
from finetune.pipeline.sweeping.sweep_report import SweepReport
from finetune.pipeline.sweeping.sweep_run import run_sweep
from finetune.planning.automatic import choose_settings
from finetune.planning.forecast import Plan, choose_target, make_plan
from finetune.recipe.sections import DtypeChoice
from finetune.runs.export_settings import BaseChoice, ExportSettings, GgufType
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.runs.results import open_result
from finetune.runs.summary import RunSummary
from finetune.training.training_rows import prepare_rows
from finetune.yulan.folding import FoldReport, fold_checkpoint

AnyRecipe = ResolvedRecipe | str | Path


def preview(recipe: AnyRecipe, rows: int = 3) -> Preview:
    """Return the first rows as the model will see them, with their trained tokens, and the counts of all rows.

    Raises:
        FinetuneError: the recipe or its rows cannot be used.
    """
    require_count("preview: rows", rows)
    tokenizer, splits = prepare_rows(_resolve("preview", recipe))
    return preview_rows(splits, tokenizer, rows)


def plan(recipe: AnyRecipe, *, memory: str | None = None, gpu: str | None = None) -> Plan:
    """Forecast the memory and the time of a training step; `memory` is a size such as `8GB`, `gpu` the name of a card.

    Raises:
        FinetuneError: the recipe cannot be trained, or the memory or the card is unknown.
    """
    size = None if memory is None else parse_memory(require_text("plan: memory", memory, "8GB"), "plan: memory")
    card = None if gpu is None else require_text("plan: gpu", gpu, "RTX 4090")
    resolved = _resolve("plan", recipe)
    target = choose_target(resolved, size, card)
    resolved, _ = choose_settings(resolved, target)
    return make_plan(resolved, target)


def train(recipe: AnyRecipe, *, resume: bool = False, force: bool = False) -> RunSummary:
    """Train and write a run directory; `resume` continues from its newest checkpoint.

    `force` also trains what by the plan does not fit the GPU.

    Raises:
        FinetuneError: the user can mend what stopped the run; before the first step nothing is left behind.
    """
    require_flag("train: resume", resume)
    require_flag("train: force", force)
    return train_on_device(_resolve("train", recipe), resume, force)


def evaluate(
    model: str | Path, data: str | Path | Sequence[str | Path], *, max_tokens: int = 2048, worst: int | None = None
) -> Scores | PairScores:
    """Return the loss on the trained tokens of held-out rows, or the accuracy on held-out pairs.

    `model` is a run directory, an alias, a hub id or a folder. Rows of more than `max_tokens` tokens are left out.
    The result names as many rows of the highest loss, or pairs of the lowest margin, as `worst` says.

    Raises:
        FinetuneError: the model or the rows cannot be used.
    """
    name, files = require_name("evaluate: model", model), require_files("evaluate: data", data)
    require_count("evaluate: max_tokens", max_tokens)
    if worst is not None:
        require_count("evaluate: worst", worst)
    score = evaluate_pairs if hold_pairs(files) else evaluate_path
    return score(name, files, max_tokens, worst or 0)


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    output: str | Path | None = None,
    protocol: Protocol = "harness",
    limit: int | None = None,
    data: str | Path | None = None,
    exemplars: str | Path | None = None,
    batch_size: int | None = None,
    chat: bool = False,
    unsafe_code: bool = False,
    engine: Sequence[str] = (),
) -> Evaluation:
    """Return the scores of a run or a model on tasks such as `lambada`; the options are those of the command line.

    `engine` is `["vllm"]` or `["server", url]`.

    Samples go into the folder `output`; the same call continues there.

    Raises:
        FinetuneError: the model, the rows or the folder cannot be used, or code cannot be run safely.
    """
    name = require_name("evaluate_tasks: model", model)
    asked = {"protocol": protocol, "limit": limit, "data": data, "exemplars": exemplars, "batch_size": batch_size}
    settings = read_task_settings("evaluate_tasks", tasks, {**asked, "chat": chat, "unsafe_code": unsafe_code})
    if words := require_list("evaluate_tasks: engine", engine, "a list such as ['server', 'http://localhost:8000/v1']"):
        settings = replace(settings, engine=read_engine(words))
    folder = None if output is None else require_path("evaluate_tasks: output", output)
    return ask_model(name, settings, folder)


def dynamics(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    tasks: Sequence[str] = (),
    protocol: Protocol = "harness",
    limit: int | None = None,
    data: str | Path | None = None,
    exemplars: str | Path | None = None,
    batch_size: int | None = None,
    unsafe_code: bool = False,
    texts: Sequence[str | Path] = (),
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    chat: bool = False,
    keep: Keep = "all",
) -> Growth:
    """Measure many checkpoints side by side, in the order of training, and write table, pictures and JSON into `output`.

    `texts` are files that activations, attention and loss are looked at on; `recipe` is trained from each checkpoint, and `chat` asks
    what it gives in its template. `keep="none"` removes each download again. The same call continues after a stop.

    Raises:
        FinetuneError: a checkpoint, the rows, the recipe or the folder cannot be used.
    """
    if isinstance(checkpoints, str | os.PathLike) or not isinstance(checkpoints, Sequence):
        raise ArgumentError(f"dynamics: checkpoints: must be a list of names; found {checkpoints!r}")
    names = [require_name("dynamics: checkpoints", name) for name in checkpoints]
    folder = require_path("dynamics: output", output)
    asked = {"protocol": protocol, "limit": limit, "data": data, "exemplars": exemplars, "batch_size": batch_size}
    settings = read_task_settings("dynamics", tasks, {**asked, "unsafe_code": unsafe_code})
    files = tuple(require_files("dynamics: texts", texts)) if texts else ()
    require_choice("dynamics: keep", keep, get_args(Keep))
    require_flag("dynamics: chat", chat)
    tuning = None
    if recipe is not None:
        changes = require_list("dynamics: overrides", overrides)
        tuning = TuningSettings(require_path("dynamics: recipe", recipe), changes, chat)
    return run_dynamics(names, DynamicsSettings(settings if settings.tasks else None, keep, files, tuning), folder)


def sweep(recipe: str | Path, output: str | Path, overrides: Sequence[str] = (), *, seeds: int = 1) -> SweepReport:
    """Train every combination of values (`"adapter.rank=8,32"`) with each seed, on the same rows; the same call continues.

    Raises:
        FinetuneError: a recipe, its rows or the folder cannot be used, or every run failed.
    """
    source, folder = require_path("sweep: recipe", recipe), require_path("sweep: output", output)
    changes = require_list("sweep: overrides", overrides)
    return run_sweep(plan_sweep(source, changes, require_count("sweep: seeds", seeds), folder))


def microanneal(
    candidate: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    start: str | Path,
    tokens: int,
    share: float = 0.3,
    mixture: str | None = None,
    held_out: Sequence[str | Path] = (),
    recipe: str | Path = DEFAULT_RECIPE,
    overrides: Sequence[str] = (),
    sft: str | Path | None = None,
    sft_overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    chat: bool = False,
) -> AnnealReport:
    """Say whether candidate data is worth it: anneal with and without it from `start`, and compare both on held-out rows and tasks.

    The options are those of the command line; `task_options` holds those of `evaluate_tasks`. The same call continues after a stop.

    Raises:
        FinetuneError: the data, a recipe, the checkpoint or the folder cannot be used, or a run fails.
    """
    files, name = require_files("microanneal: candidate", candidate), require_name("microanneal: start", start)
    sizes = (require_number("microanneal: share", share), require_count("microanneal: tokens", tokens))
    phase = None if mixture is None else require_text("microanneal: mixture", mixture, "phase26")
    held = tuple(require_files("microanneal: held_out", held_out)) if held_out else ()
    source, folder = require_path("microanneal: recipe", recipe), require_path("microanneal: output", output)
    texts = require_list("microanneal: overrides", overrides)
    request = AnnealRequest(tuple(files), *sizes, name, folder, phase, held, source, texts)
    if sft is not None:
        changes = require_list("microanneal: sft_overrides", sft_overrides)
        tuning = TuningSettings(require_path("microanneal: sft", sft), changes, require_flag("microanneal: chat", chat))
        request = replace(request, tuning=tuning)
    asked = read_task_settings("microanneal", tasks, task_options or {}) if tasks else None
    return run_microanneal(plan_anneal(request, asks_tasks=bool(tasks)), asked)


def export(
    run: str | Path,
    output: str | Path,
    *,
    dtype: DtypeChoice = "auto",
    max_shard_size: str = "2GB",
    base: BaseChoice = "full",
    verify: bool = True,
    base_model: str | None = None,
    gguf: Sequence[GgufType] = (),
) -> ExportReport:
    """Merge the adapter of a run, write Llama weights, reopen them and compare; also write GGUF files of the types in `gguf`.

    See `ExportSettings` for the options. `run` may also be a checkpoint of a run, or an adapter folder that PEFT wrote, whose base
    `base_model` names where it is not where the folder says.

    Raises:
        FinetuneError: the adapter does not fit its base, or the export is not what was trained; no output is left.
    """
    folder, target = require_path("export: run", run), require_path("export: output", output)
    parse_size(require_text("export: max_shard_size", max_shard_size, "2GB"), "export: max_shard_size")
    require_flag("export: verify", verify)
    named_base = None if base_model is None else require_name("export: base_model", base_model)
    types = require_list("export: gguf", gguf, "a list of GGUF types")
    settings = ExportSettings(dtype, max_shard_size, base, verify, types)
    verifier, prover = LogitVerifier() if verify else None, make_prover(settings)
    return export_result(open_result(folder), target, settings, verifier, prover, base_model=named_base)


def fold(
    checkpoint: str | Path, output: str | Path, *, dtype: DtypeChoice = "auto", max_shard_size: str = "2GB"
) -> FoldReport:
    """Fold a base checkpoint exactly into Llama weights; give an alias, a hub id with an optional `@revision`, or a folder.

    Raises:
        FinetuneError: it cannot be found, read or folded, or the output folder is not empty.
    """
    name = require_name("fold: checkpoint", checkpoint)
    target = require_path("fold: output", output)
    parse_size(require_text("fold: max_shard_size", max_shard_size, "2GB"), "fold: max_shard_size")
    settings = ExportSettings(dtype, max_shard_size)
    return fold_checkpoint(find_checkpoint(name), target, settings.dtype, settings.max_shard_bytes)


def open_model(name: str | Path) -> LoadedModel:
    """Open a run, or a model by its alias, hub id or folder; `.answer("a question")` generates an answer.

    Raises:
        FinetuneError: there is no such model, or its template is not the one that it was trained with.
    """
    return open_named_model(require_name("open_model: name", name))


def _resolve(function: str, recipe: AnyRecipe) -> ResolvedRecipe:
    if isinstance(recipe, ResolvedRecipe):
        return recipe
    expected = "the path or the name of a recipe (str or pathlib.Path), or what load_recipe returned"
    return load_recipe(require_path(f"{function}: recipe", recipe, expected))
