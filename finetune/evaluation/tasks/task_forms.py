"""What a task is made of: its questions, its scores, and how samples become one figure."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from transformers import PreTrainedTokenizerBase

from finetune.evaluation.asking.generation import Generation
from finetune.evaluation.sandbox.programs import Program, Verdict
from finetune.evaluation.tasks.task_names import Shots

Protocol = Literal["harness", "authors"]
Row = Mapping[str, Any]
Sample = dict[str, Any]

# As lm-evaluation-harness 0.4.13 does it: 100 times 1,000 draws, each thousand with its own seed.
_BOOTSTRAP_SEEDS, _BOOTSTRAP_DRAWS = 100, 1_000


@dataclass(frozen=True)
class Question:
    """What a model is asked for one row.

    `answer` is the text whose log-likelihood is measured: the continuation of a likelihood task, the gold answer of a generated one.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Tools:
    """What prompts and scores need beside the row: the tokenizer, and the function that runs a program."""

    tokenizer: PreTrainedTokenizerBase
    run_program: Callable[[Program], Verdict]


@dataclass(frozen=True)
class Figure:
    """A score over all samples with its standard error; None where one sample gives no such error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Measure:
    """A score: its name, the field of a sample that holds its numbers, and how they become one figure.

    `percent` turns the figure into percent of right rows, and is None where it is no such share. `is_right_or_wrong` says that a sample
    is one of the two, `is_published` that the authors' table holds this score of its task.
    """

    name: str
    field: str
    summarise: Callable[[Sequence[float]], Figure]
    percent: float | None = 100.0
    is_right_or_wrong: bool = True
    is_published: bool = True


@dataclass(frozen=True)
class TaskForm:
    """A task under one protocol.

    `ask` takes all rows, the exemplars and the tools, and returns a question for each row. `score` takes a row, what the model gave
    (a log-likelihood, or the generated texts) and the tools, and returns fields of the sample. `generation` is None for a task
    of log-likelihoods.
    """

    task: str
    protocol: Protocol
    ask: Callable[[Sequence[Row], Sequence[Row], Tools], list[Question]]
    score: Callable[[Row, Any, Tools], Sample]
    measures: tuple[Measure, ...]
    generation: Generation | None = None
    shots: Shots | None = None
    runs_code: bool = False


def average(values: Sequence[float]) -> Figure:
    """Return the mean and its standard error, with the standard deviation of a sample (n - 1)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Figure(mean, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Figure(mean, deviation / math.sqrt(len(values)))


def average_in_percent(values: Sequence[float]) -> Figure:
    """Return mean and standard error in percent."""
    figure = average(values)
    return Figure(100 * figure.value, None if figure.stderr is None else 100 * figure.stderr)


def perplexity(loglikelihoods: Sequence[float]) -> Figure:
    """Return exp(-mean) of log-likelihoods in nats per text, and a standard error by bootstrap.

    Source: `perplexity` and `bootstrap_stderr` of lm-evaluation-harness 0.4.13; the draws are the same.
    """
    values = numpy.array(loglikelihoods, dtype=numpy.float64)
    with numpy.errstate(over="ignore", invalid="ignore"):
        found = [draw for seed in range(_BOOTSTRAP_SEEDS) for draw in _draw_perplexities(values, seed)]
        mean = sum(found) / len(found)
        stderr = math.sqrt(float(numpy.square(numpy.array(found) - mean).sum()) / (len(found) - 1))
        value = float(numpy.exp(-values.mean()))
    return Figure(value, stderr if len(values) > 1 else None)


def _draw_perplexities(values: numpy.ndarray, seed: int) -> list[float]:
    """Return the perplexities of resamples; the indices are those of `random.Random(seed).choices`."""
    _, state, _ = random.Random(seed).getstate()
    generator = numpy.random.RandomState()
    generator.set_state(("MT19937", numpy.array(state[:-1], dtype=numpy.uint32), state[-1], 0, 0.0))
    drawn = (generator.random_sample((_BOOTSTRAP_DRAWS, len(values))) * len(values)).astype(numpy.int64)
    return [float(value) for value in numpy.exp(-values[drawn].mean(axis=1))]
