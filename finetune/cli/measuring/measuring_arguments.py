"""The arguments of the verbs that measure models on tasks."""

import argparse
from collections.abc import Callable

from finetune.cli.arguments import RUN_OR_MODEL, read_count
from finetune.files.folders import expand_home


def add_evaluate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=expand_home, nargs="+", metavar="FILE", help="rows to evaluate on")
    what.add_argument(
        "--tasks", type=read_names, metavar="TASKS", help="tasks to evaluate on, such as lambada,gsm8k,humaneval"
    )
    verb.add_argument(
        "--max-tokens",
        type=read_count,
        default=2048,
        metavar="N",
        help="leave longer rows out (with --data; default: 2048)",
    )
    verb.add_argument(
        "--worst",
        type=read_count,
        default=0,
        metavar="N",
        help="also show the N rows of the highest loss, or pairs of the lowest margin (with --data)",
    )
    add_option = add_task_options(verb)
    add_option("--chat", action="store_true", help="ask in the model's chat template")
    add_option(
        "--engine",
        nargs="+",
        metavar="WORD",
        help="vllm, or server URL [NAME]: another program asks the model; 20 of its first answers are compared with the model here",
    )
    add_option(
        "-o",
        "--output",
        type=expand_home,
        metavar="DIR",
        help="where the samples go (default: evaluations/MODEL-PROTOCOL)",
    )


def add_dynamics(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=f"{RUN_OR_MODEL}, in the order of training")
    verb.add_argument("-o", "--output", type=expand_home, metavar="DIR", help="a new folder, or that of a stopped call")
    verb.add_argument(
        "--published", action="store_true", help="compare the published scores alone; fetch and write nothing"
    )
    verb.add_argument(
        "--keep",
        choices=("all", "none"),
        default="all",
        help="none: remove each checkpoint's download and fold again, so that one is on the disk at a time",
    )
    verb.add_argument(
        "--tasks", type=read_names, metavar="TASKS", help="tasks to evaluate on, such as lambada,gsm8k,humaneval"
    )
    verb.add_argument(
        "--rows",
        type=expand_home,
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts on which activations, attention and loss of each layer, position and source are looked at",
    )
    add_task_options(verb)
    tuning = verb.add_argument_group("the same fine-tuning from each checkpoint")
    tuning.add_argument("--sft", type=expand_home, metavar="RECIPE", help="a recipe to train from each, and evaluate")
    tuning.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    tuning.add_argument("--chat", action="store_true", help="ask the tuned models in their chat template")


def add_task_options(verb: argparse.ArgumentParser) -> Callable[..., object]:
    """Add the group of options that tasks have; return the function that adds another option to it."""
    tasks = verb.add_argument_group("with --tasks")
    tasks.add_argument(
        "--protocol",
        choices=("harness", "authors"),
        default="harness",
        help="as lm-evaluation-harness does it (default), or as the authors' published table was made",
    )
    tasks.add_argument("--limit", type=read_count, metavar="N", help="evaluate the first N rows of each task only")
    tasks.add_argument(
        "--task-data",
        type=expand_home,
        metavar="PATH",
        help="a file with a task's rows, or a folder (default: from the hub)",
    )
    tasks.add_argument(
        "--exemplars",
        type=expand_home,
        metavar="PATH",
        help="a file with rows that stand in the prompts as examples, or a folder for several tasks",
    )
    tasks.add_argument(
        "--batch-size", type=read_count, metavar="N", help="prompts at once (default: what memory allows)"
    )
    tasks.add_argument(
        "--unsafe-code", action="store_true", help="run generated code without a sandbox, with your rights"
    )
    return tasks.add_argument


def read_names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
