"""Run the stages of a chain one after the other into one folder; a resumed chain continues where it was stopped."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from finetune.check.chain_stages import Chain, ExportStage, SynthesizeStage, TrainStage, dump_chain
from finetune.check.chains import resolve_stage
from finetune.data.reading.sources import hash_source
from finetune.errors import DataError, describe_count
from finetune.exporting.gguf.llama_cpp import make_prover
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.cache import hash_file
from finetune.files.json_files import read_json, write_json, write_text
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.files.safety.locks import LOCK_FILE
from finetune.models.precision import choose_device, choose_precision
from finetune.pipeline.finishing import finish_training, free_memory
from finetune.pipeline.memory_ladder import train_on_device
from finetune.recipe.sections import to_plain
from finetune.runs.results import open_result
from finetune.runs.resuming import check_same_recipe, hold_output
from finetune.runs.run_files import (
    CHAIN_RECORD_FILE,
    EXPORT_REPORT_FILE,
    PEFT_WEIGHTS_FILE,
    RECIPE_FILE,
)
from finetune.runs.summary import RunSummary, describe_run
from finetune.synthesis.synthesize_run import synthesize_rows
from finetune.training.trainer import make_config
from finetune.training.training_rows import prepare_rows, read_data_settings
from finetune.yulan.tensors import list_weight_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSummary:
    """The outcome of one stage; `path` is its run directory or its export, `was_done` says that it had finished before."""

    name: str
    path: str
    was_done: bool
    result: dict[str, Any]


@dataclass(frozen=True)
class ChainSummary:
    """What a finished chain reports; `export` is the last export, if the chain has one.

    A recipe without `stages:` is a chain of one stage without a name, and reports that stage alone.
    """

    output: str
    stages: list[StageSummary]
    export: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        first = self.stages[0]
        return asdict(self) if first.name else first.result


def run_chain(chain: Chain, resume: bool = False, force: bool = False) -> ChainSummary:
    """Run every stage of a checked chain that has not finished; `force` also trains what by the plan does not fit.

    Raises:
        FinetuneError: the user can mend what stopped a stage; finished stages stay, for `--resume`.
    """
    if chain.single is not None:
        summary = train_on_device(chain.single.resolved, resume, force)
        return ChainSummary(str(chain.output), [StageSummary("", summary.run, False, asdict(summary))], None)
    # Under a launcher, all processes run every stage together, and only the first one writes.
    processes = _open_processes(chain)
    is_writer = processes.process_index == 0
    with hold_output(chain.output, "chain", resume=resume) if is_writer else contextlib.nullcontext():
        if is_writer:
            _open_output(chain, resume)
        processes.distributed_state.wait_for_everyone()
        with _leave_nothing_before_stage_one(chain, processes):
            if is_writer:
                for stage in chain.trainings:
                    # A faulty row of the last stage is reported before the first one trains. The rows stay in the cache.
                    prepare_rows(stage.resolved)
            processes.distributed_state.wait_for_everyone()
            summaries = _run_stages(chain, processes, force)
    exports = [str(stage.output) for stage in chain.stages if isinstance(stage, ExportStage)]
    return ChainSummary(str(chain.output), summaries, exports[-1] if exports else None)


def _run_stages(chain: Chain, processes: TrainingArguments, force: bool) -> list[StageSummary]:
    """Run or skip each stage, and free its memory before the next one."""
    summaries = []
    for number, stage in enumerate(chain.stages, 1):
        logger.info("stage %d of %d: %s", number, len(chain.stages), stage.name)
        if isinstance(stage, TrainStage):
            summaries.append(_run_training(stage, processes, force))
        elif isinstance(stage, SynthesizeStage):
            summaries.append(_run_synthesis(stage, chain, processes))
        else:
            summaries.append(_run_export(stage, chain, processes))
        free_memory()
    return summaries


@contextlib.contextmanager
def _leave_nothing_before_stage_one(chain: Chain, processes: TrainingArguments) -> Iterator[None]:
    """Remove the output of a chain that stops before its first stage has written anything."""
    try:
        yield
    except BaseException:
        if processes.process_index == 0 and {path.name for path in chain.output.iterdir()} <= {RECIPE_FILE, LOCK_FILE}:
            (chain.output / RECIPE_FILE).unlink(missing_ok=True)
        raise


def _open_processes(chain: Chain) -> TrainingArguments:
    """Return a trainer configuration, by which the processes of a launcher know their number and wait for each other."""
    first = chain.trainings[0].resolved
    precision = choose_precision(first.recipe.model.dtype, choose_device(first.uses_cpu), first.trains_all_weights)
    config = make_config(first, first.evaluates, precision)
    logger.debug("running on %s", config.device)  # asking for the device opens the process group
    return config


def _open_output(chain: Chain, resume: bool) -> None:
    """Write the recipe of a new chain, or check that a resumed one has the same recipe.

    Raises:
        FinetuneError: it has another recipe, or the folder cannot be written.
    """
    file = chain.output / RECIPE_FILE
    if resume:
        check_same_recipe(file, dump_chain(chain), "chain")
        return
    with translate_os_errors(chain.output):
        write_text(file, dump_chain(chain))


def _run_training(stage: TrainStage, processes: TrainingArguments, force: bool) -> StageSummary:
    resolved, state = resolve_stage(stage), processes.distributed_state
    finished = finish_training(resolved, force, state.wait_for_everyone, is_writer=processes.process_index == 0)
    return StageSummary(stage.name, str(resolved.output), finished.was_done, finished.summary)


def _hash_weights(run: Path) -> list[str]:
    result = open_result(run)
    weights = [result.folder / PEFT_WEIGHTS_FILE] if result.is_adapter else list_weight_files(result.folder)
    return [hash_file(file) for file in weights]


def _run_synthesis(stage: SynthesizeStage, chain: Chain, processes: TrainingArguments) -> StageSummary:
    """Let the run before write rows. They are written again where its weights, the prompts or the recipe are others."""
    record_file, resolved = chain.output / CHAIN_RECORD_FILE, stage.run_resolved
    recipe = to_plain(resolved.recipe)
    settings = {key: recipe[key] for key in ("data", "synthesize", "endpoints", "seed")}
    sources = [hash_source(source) for source in read_data_settings(resolved).train]
    identity = _to_json({"weights": _hash_weights(stage.run), "settings": settings, "sources": sources})
    record = read_json(record_file) or {}
    is_done = stage.output.is_dir() and record.get(stage.name, {}).get("identity") == identity
    processes.distributed_state.wait_for_everyone()
    if processes.process_index == 0 and not is_done:
        shutil.rmtree(stage.output, ignore_errors=True)
        try:
            report = synthesize_rows(resolved, stage.output).to_json()
        except DataError as error:
            raise DataError(f"stage {stage.name}: {error}") from error
        record = {**record, stage.name: {"identity": identity, "report": report}}
        write_json(record_file, record)
    processes.distributed_state.wait_for_everyone()
    record = read_json(record_file) or {}
    if is_done:
        logger.info("%s: finished already", stage.output)
    return StageSummary(stage.name, str(stage.output), is_done, record[stage.name]["report"])


def _run_export(stage: ExportStage, chain: Chain, processes: TrainingArguments) -> StageSummary:
    record_file = chain.output / CHAIN_RECORD_FILE
    result = open_result(stage.run)
    # An export of other weights, compared by content, or with other settings is made again.
    identity = {"weights": _hash_weights(stage.run), "settings": _to_json(vars(stage.settings))}
    record = read_json(record_file) or {}
    is_done = stage.output.is_dir() and record.get(stage.name) == identity
    processes.distributed_state.wait_for_everyone()
    if processes.process_index == 0 and not is_done:
        shutil.rmtree(stage.output, ignore_errors=True)
        verifier = LogitVerifier() if stage.settings.verify else None
        export_result(result, stage.output, stage.settings, verifier, make_prover(stage.settings))
        write_json(record_file, {**record, stage.name: identity})
    processes.distributed_state.wait_for_everyone()
    if is_done:
        logger.info("%s: finished already", stage.output)
    report = read_json(stage.output / EXPORT_REPORT_FILE)
    return StageSummary(stage.name, str(stage.output), is_done, report)


def _to_json(content: Any) -> Any:
    """Return values as a JSON file gives them back, so that they can be compared with stored ones: a tuple becomes a list."""
    return json.loads(json.dumps(content))


def describe_chain(summary: ChainSummary) -> str:
    """Return the summary as text for a person."""
    lines = []
    for stage in summary.stages:
        result, note = stage.result, " (finished before)" if stage.was_done else ""
        if "steps" in result:
            # A chain that was moved after the stage has finished has the run in another folder than its record says.
            text = describe_run(RunSummary(**{**result, "run": stage.path}))
            lines.append(
                f"{stage.name}{note}: {text}"
                if stage.name
                else f"{text}\nexport it: finetune export {stage.path} -o DIR"
            )
            continue
        if "job" in result:
            lines.append(
                f"{stage.name}{note}: {stage.path}: {describe_count(result['rows'], 'row')} made of {result['seeds']:,}"
            )
            continue
        verify = result["verify"]
        compared = "not compared" if verify is None else f"same likeliest token {verify['top1_agreement']:.1%}"
        lines.append(
            f"{stage.name}{note}: {stage.path}: {result['bytes'] / 1e6:,.1f} MB of {result['dtype']}, {compared}"
        )
    if summary.export is not None:
        lines.append(f"talk to it: finetune chat {summary.export}")
    return "\n".join(lines)
