"""The form of each task under each protocol: its prompts, its scores, and how a text is generated."""

from collections.abc import Sequence

from finetune.errors import FinetuneError
from finetune.evaluation.asking.generation import Generation
from finetune.evaluation.tasks.rules import gsm8k, humaneval, lambada, mbpp
from finetune.evaluation.tasks.task_forms import (
    Measure,
    Protocol,
    TaskForm,
    average,
    average_in_percent,
    perplexity,
)
from finetune.evaluation.tasks.task_names import GSM8K_SHOTS, MBPP_SHOTS, TASKS, Shots, describe_unknown_task

_NO_EXEMPLARS = (
    "no exemplars are named (--exemplars FILE), so the prompts hold none; the published scores were made with 7"
)

FORMS: tuple[TaskForm, ...] = (
    TaskForm(
        "lambada",
        "harness",
        lambada.ask_likelihood,
        lambada.score_likelihood,
        (
            Measure("acc", "greedy", average),
            Measure(
                "perplexity", "loglikelihood", perplexity, percent=None, is_right_or_wrong=False, is_published=False
            ),
        ),
    ),
    TaskForm(
        "lambada",
        "authors",
        lambada.ask_word,
        lambada.score_word,
        (Measure("accuracy", "correct", average_in_percent, percent=1.0),),
        Generation(max_new_tokens=5),
    ),
    TaskForm(
        "gsm8k",
        "harness",
        gsm8k.ask_harness,
        gsm8k.score_harness,
        (
            Measure("strict", "strict_correct", average, is_published=False),
            Measure("flexible", "flexible_correct", average),
        ),
        Generation(max_new_tokens=256, stops=("Question:", "</s>", "<|im_end|>")),
        GSM8K_SHOTS,
    ),
    TaskForm(
        "gsm8k",
        "authors",
        gsm8k.ask_authors,
        gsm8k.score_authors,
        (Measure("accuracy", "correct", average_in_percent, percent=1.0),),
        Generation(max_new_tokens=596, stops=("\n\nQuestion", "\n\nAnswer")),
        Shots(gsm8k.AUTHORS_SHOTS, hub_split=None, missing=_NO_EXEMPLARS),
    ),
    TaskForm(
        "humaneval",
        "harness",
        humaneval.ask_harness,
        humaneval.score_harness,
        (Measure("pass@1", "passed", average),),
        Generation(max_new_tokens=1024, stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
        runs_code=True,
    ),
    TaskForm(
        "humaneval",
        "authors",
        humaneval.ask_authors,
        humaneval.score_authors,
        (Measure("pass@1", "share", average_in_percent, percent=1.0, is_right_or_wrong=False),),
        Generation(max_new_tokens=512, temperature=0.1, samples=20),
        runs_code=True,
    ),
    TaskForm(
        "mbpp",
        "harness",
        mbpp.ask,
        mbpp.score,
        (Measure("pass@1", "passed", average),),
        Generation(max_new_tokens=256, stops=("[DONE]",)),
        MBPP_SHOTS,
        runs_code=True,
    ),
)


def find_forms(names: Sequence[str], protocol: Protocol) -> list[TaskForm]:
    """Return the forms of tasks under a protocol, in the order of their names.

    Raises:
        FinetuneError: a task is unknown, or none is named.
    """
    for name in names:
        if name not in TASKS:
            raise FinetuneError(f"--tasks: {name!r} is {describe_unknown_task(name)}")
    if not names:
        raise FinetuneError(f"--tasks: names no task; known are {', '.join(TASKS)}")
    forms = {(form.task, form.protocol): form for form in FORMS}
    for name in names:
        if (name, protocol) not in forms:
            raise FinetuneError(f"--tasks: {name} is no task of the protocol {protocol}; leave it or --protocol out")
    return [forms[name, protocol] for name in dict.fromkeys(names)]
