"""Evaluate one model on tasks: read the rows, ask what is not yet answered, and summarise."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.errors import EndpointError
from finetune.evaluation.asking.asked_model import AskedModel, to_bits
from finetune.evaluation.asking.generation import Generated, Prompt
from finetune.evaluation.asking.served_model import NO_LIKELIHOODS
from finetune.evaluation.sandbox.programs import Program, Verdict, choose_runner
from finetune.evaluation.suite.suite_run import ask_suite
from finetune.evaluation.suite.suite_tasks import load_suite, split_names
from finetune.evaluation.tasks.task_data import Rows, hash_rows, read_exemplars, read_task_rows
from finetune.evaluation.tasks.task_forms import Question, Sample, TaskForm, Tools
from finetune.evaluation.tasks.task_names import TASKS
from finetune.evaluation.tasks.task_results import (
    RESULTS_FILE,
    ROWS,
    Evaluation,
    SampleFile,
    TaskResult,
    check_folder,
    holds_figures,
    make_folder,
    summarise,
    weigh_gold,
)
from finetune.evaluation.tasks.task_settings import TaskSettings, choose_folder, open_asked
from finetune.evaluation.tasks.task_table import find_forms
from finetune.files.json_files import write_json
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.files.safety.locks import lock_folder
from finetune.models.opening import fingerprint_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """A task with all its rows and exemplars read, and the rows that are asked."""

    form: TaskForm
    rows: Rows
    exemplars: Rows
    asked: int
    notes: tuple[str, ...] = field(default=())


def evaluate_tasks(model: str, settings: TaskSettings, folder: Path | None = None) -> Evaluation:
    """Evaluate a run or a model on tasks; what a folder holds of the same evaluation is not asked again.

    All that the user can mend is found before the model is loaded.

    Raises:
        FinetuneError: the model, the rows, or the folder cannot be used, or code cannot be run safely.
    """
    own, outer = split_names(settings.tasks)
    prepared = prepare_tasks(replace(settings, tasks=own)) if own or not outer else []
    suite = load_suite(outer, settings.data, unsafe_code=settings.unsafe_code) if outer else None
    runner = choose_runner(settings.unsafe_code) if any(one.form.runs_code for one in prepared) else None
    folder = folder or choose_folder(model, settings.protocol)
    described = describe_evaluation(fingerprint_model(model), prepared, settings)
    if suite is not None:
        described["lm_eval"] = suite.version
    check_folder(folder, described)
    with open_asked(model, settings) as asked:
        _check_likelihoods(asked, prepared)
        make_folder(folder, described)
        with lock_folder(folder):
            evaluation = ask_tasks(asked, model, prepared, settings, folder, runner)
            if suite is not None:
                for result in ask_suite(suite, asked, settings.protocol, folder, settings.limit, settings.unsafe_code):
                    _keep_result(evaluation, result, folder)
    return evaluation


def _check_likelihoods(asked: AskedModel, prepared: Sequence[PreparedTask]) -> None:
    """Check that log-likelihoods can be had where a task needs them.

    Raises:
        EndpointError: a server gives none.
    """
    needing = [one.form.task for one in prepared if one.form.generation is None]
    if needing and not asked.gives_likelihoods():
        raise EndpointError(f"--tasks: {needing[0]}: {NO_LIKELIHOODS}")


def prepare_tasks(
    settings: TaskSettings, options: tuple[str, str] = ("--task-data", "--exemplars")
) -> list[PreparedTask]:
    """Read the rows and the exemplars of all tasks. A message names the `options` by which a person gives these files.

    Raises:
        FinetuneError: a task is unknown, or its rows cannot be used.
    """
    prepared = []
    for form in find_forms(settings.tasks, settings.protocol):
        task = TASKS[form.task]
        rows = read_task_rows(task, settings.data, len(settings.tasks) == 1, options[0])
        exemplars = read_exemplars(task, form.shots, settings.exemplars, options[1])
        notes = (form.shots.missing,) if form.shots and not exemplars else ()
        prepared.append(PreparedTask(form, rows, exemplars, min(len(rows), settings.limit or len(rows)), notes))
    return prepared


def ask_tasks(
    asked: AskedModel,
    model: str,
    prepared: Sequence[PreparedTask],
    settings: TaskSettings,
    folder: Path,
    runner: Callable[[Program], Verdict] | None,
) -> Evaluation:
    """Ask a loaded model every row that the folder has no sample of, and write the results into the folder."""
    tools = Tools(asked.loaded.tokenizer, runner or _refuse)
    evaluation = Evaluation(model, settings.protocol, str(folder))
    for one in prepared:
        samples = SampleFile(folder / f"{one.form.task}.jsonl", holds_figures(one.form.measures))
        _ask_task(asked, one, samples, tools)
        _keep_result(evaluation, _summarise(one, samples), folder)
    return evaluation


def _keep_result(evaluation: Evaluation, result: TaskResult, folder: Path) -> None:
    evaluation.tasks[result.task] = result
    with translate_os_errors(folder, "the samples are kept; the same command continues"):
        write_json(folder / RESULTS_FILE, evaluation.to_json())


def score_task(asked: AskedModel, one: PreparedTask, runner: Callable[[Program], Verdict] | None) -> TaskResult:
    """Ask a model every row of a task, and return its figures; nothing is written."""
    samples = SampleFile()
    _ask_task(asked, one, samples, Tools(asked.loaded.tokenizer, runner or _refuse))
    return _summarise(one, samples)


def recall_evaluation(
    model: str, fingerprint: str | None, prepared: Sequence[PreparedTask], settings: TaskSettings, folder: Path
) -> Evaluation | None:
    """Return the evaluation that a folder holds, or None where a sample is missing; the model is not opened.

    `fingerprint` is that of the model's weights, or None where they are not on this machine and cannot be compared.

    Raises:
        OutputError: the folder holds another evaluation, or something else.
    """
    described = describe_evaluation(fingerprint or "", prepared, settings)
    if fingerprint is None:
        del described["model"]
    check_folder(folder, described)
    evaluation = Evaluation(model, settings.protocol, str(folder))
    for one in prepared:
        samples = SampleFile(folder / f"{one.form.task}.jsonl", holds_figures(one.form.measures))
        if any(row not in samples.samples for row in range(one.asked)):
            return None
        evaluation.tasks[one.form.task] = _summarise(one, samples)
    return evaluation


def describe_evaluation(fingerprint: str, prepared: Sequence[PreparedTask], settings: TaskSettings) -> dict[str, Any]:
    """Return what samples depend on, so that those of another evaluation are not taken for this one's.

    `fingerprint` is that of the model's weights. Neither the limit nor the batch size changes a sample.
    """
    described: dict[str, Any] = {"protocol": settings.protocol, "chat": settings.chat, "model": fingerprint}
    described["engine"] = None if settings.engine is None else settings.engine.name
    for one in prepared:
        described[f"{ROWS}{one.form.task}"] = hash_rows(one.rows)
        described[f"exemplars of {one.form.task}"] = hash_rows(one.exemplars)
    return described


def _refuse(program: Program) -> Verdict:
    raise RuntimeError("a task that runs no code asked for a program to be run")


def _ask_task(asked: AskedModel, one: PreparedTask, samples: SampleFile, tools: Tools) -> None:
    questions = one.form.ask(one.rows, one.exemplars, tools)[: one.asked]
    missing = [row for row in range(one.asked) if row not in samples.samples]
    if len(missing) < one.asked:
        logger.info("%s: %s of %s samples are there already", one.form.task, one.asked - len(missing), one.asked)
    ask = _ask_likelihoods if one.form.generation is None else _ask_texts
    shown = tqdm(ask(asked, one.form, questions, missing), total=len(missing), desc=one.form.task, disable=None)
    for row, found, beside in shown:
        samples.add(row, one.form.score(one.rows[row], found, tools) | beside)


def _ask_likelihoods(
    asked: AskedModel, form: TaskForm, questions: Sequence[Question], rows: Sequence[int]
) -> Iterator[tuple[int, Any, Sample]]:
    pairs = [asked.encode_pair(asked.render(questions[row].prompt), questions[row].answer) for row in rows]
    for index, found in asked.measure(pairs):
        counts = {"context_tokens": found.context_tokens, "continuation_tokens": found.continuation_tokens}
        question = questions[rows[index]]
        yield rows[index], found, counts | {"prompt": question.prompt, "answer": question.answer}


def _ask_texts(
    asked: AskedModel, form: TaskForm, questions: Sequence[Question], rows: Sequence[int]
) -> Iterator[tuple[int, Any, Sample]]:
    settings = form.generation
    assert settings is not None
    rendered = [asked.render(questions[row].prompt) for row in rows]
    pairs = [asked.encode_pair(text, questions[row].answer) for text, row in zip(rendered, rows, strict=True)]
    gold: dict[int, Sample] = {}
    if asked.gives_likelihoods():
        for index, likelihood in asked.measure(pairs):
            gold_bytes = len(questions[rows[index]].answer.encode())
            gold[rows[index]] = {"gold_bits": to_bits(likelihood), "gold_bytes": gold_bytes}
    prompts = [
        Prompt(asked.encode(text), seed=row * settings.samples + number)
        for text, row in zip(rendered, rows, strict=True)
        for number in range(settings.samples)
    ]
    found: dict[int, dict[int, Generated]] = {}
    for index, generated in asked.generate(prompts, settings):
        row, number = rows[index // settings.samples], index % settings.samples
        texts = found.setdefault(row, {})
        texts[number] = generated
        if len(texts) == settings.samples:
            del found[row]
            question = questions[row]
            beside = {"prompt": question.prompt, "prompt_tokens": generated.prompt_tokens, **gold.get(row, {})}
            yield row, [texts[number] for number in range(settings.samples)], beside


def _summarise(one: PreparedTask, samples: SampleFile) -> TaskResult:
    kept = [samples.samples[row] for row in range(one.asked)]
    metric, stderr = summarise(one.form.measures, kept)
    return TaskResult(
        one.form.task,
        one.form.protocol,
        len(kept),
        metric,
        stderr,
        weigh_gold(kept),
        "" if samples.file is None else str(samples.file),
        one.notes,
    )
