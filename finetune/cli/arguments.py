"""The arguments of each verb, with their help."""

import argparse
from pathlib import Path

from finetune.data.lint.findings import KINDS
from finetune.errors import describe_unknown_name
from finetune.files.folders import expand_home
from finetune.mixtures.published import FIRST_PHASE, LAST_PHASE

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")
_ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
RUN_OR_MODEL = "a run directory, or an alias, a hub id or a folder"


def add_nothing(verb: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def add_checkpoints(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--states", type=expand_home, metavar="FOLDER", help="show the optimizer state that a folder holds"
    )


def add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "recipe", metavar="RECIPE", type=expand_home, help="a recipe file, or the name of a shipped recipe"
    )
    verb.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")


def _add_writing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-o", "--output", type=expand_home, required=True, metavar="DIR", help="a new or empty folder")
    verb.add_argument("--dtype", choices=_DTYPES, default="auto", help="type of the weights (default: as stored)")
    verb.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file (default: 2GB)")


def add_recipes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "name", metavar="NAME", nargs="?", type=expand_home, help="print this shipped recipe with all its keys"
    )
    verb.add_argument("-o", "--output", type=expand_home, metavar="FILE", help="write the output to a new file instead")
    verb.add_argument("--keys", action="store_true", help="explain every key that a recipe can have")
    verb.add_argument("--agents", action="store_true", help="print what a coding assistant needs to write recipes")


def add_init(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--data", type=expand_home, metavar="FILE", help="a file or folder with your rows")
    verb.add_argument("--base", metavar="CHECKPOINT", help="an alias, a hub id, a folder, or a run to continue")
    verb.add_argument(
        "--device", metavar="DEVICE", help='a GPU\'s memory or name (8GB, "RTX 4060 Laptop"), cpu, or auto'
    )
    verb.add_argument(
        "--goal", choices=("chat", "pairs", "labels"), help="train answers, pairs (DPO) or labelled answers (KTO)"
    )
    verb.add_argument(
        "-o",
        "--output",
        type=expand_home,
        default=Path("my.yaml"),
        metavar="FILE",
        help="a new file (default: my.yaml)",
    )
    verb.add_argument("--yes", action="store_true", help="ask nothing: take the default for what no option says")


def add_mixtures(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--datasets", action="store_true", help="list the open data sets that were used, with their addresses"
    )
    verb.add_argument("--phase", type=_read_phase, metavar="N", help="show one phase with its data sets")
    verb.add_argument(
        "--plot", type=expand_home, metavar="FILE", help="also draw the categories over all phases (.png, .svg, .pdf)"
    )


def _read_phase(text: str) -> int:
    if not text.isdecimal() or not FIRST_PHASE <= int(text) <= LAST_PHASE:
        raise argparse.ArgumentTypeError(f"must be a phase from {FIRST_PHASE} to {LAST_PHASE}; found {text!r}")
    return int(text)


def add_fold(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="an alias, a hub id with an optional @revision, or a folder"
    )
    _add_writing(verb)


def add_preview(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    verb.add_argument("-n", "--rows", type=read_count, default=3, metavar="N", help="how many rows (default: 3)")
    verb.add_argument(
        "--html", type=expand_home, metavar="FILE", help="also write them as one self-contained HTML page"
    )


def add_lint(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    verb.add_argument(
        "--fix",
        type=expand_home,
        metavar="DIR",
        help="write the rows without findings, unchanged, into a new or empty folder",
    )
    verb.add_argument(
        "--only",
        type=_read_kinds,
        metavar="KINDS",
        help="leave out these kinds only, such as unreadable,too_long (with --fix)",
    )


def add_clean(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    where = "a new or empty folder; with --emit a new file"
    verb.add_argument("-o", "--output", type=expand_home, required=True, metavar="DIR", help=where)
    verb.add_argument(
        "--emit",
        choices=["datatrove"],
        help="write the steps that need no model as a pipeline of this program, and run none",
    )


def add_synthesize(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    verb.add_argument("-o", "--output", type=expand_home, metavar="DIR", help="a new or empty folder")
    verb.add_argument(
        "--dry-run", action="store_true", help="say how many requests and tokens are coming, and ask nothing"
    )


def _read_kinds(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name!r} is {describe_unknown_name(name, KINDS, 'an unknown kind')}")
    if not names:
        raise argparse.ArgumentTypeError(f"names no kind; known are {', '.join(KINDS)}")
    return frozenset(names)


def add_plan(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    verb.add_argument("--memory", metavar="SIZE", help="say whether the run fits a GPU with this memory, such as 8GB")
    verb.add_argument("--gpu", metavar="NAME", help='say whether the run fits this GPU, such as "RTX 4060 Laptop"')
    verb.add_argument(
        "--processes", type=read_count, metavar="N", help="number of processes; the plan is for one of them"
    )
    verb.add_argument("--engine", choices=_ENGINES, help="how the processes share the work (default: ddp)")
    verb.add_argument(
        "--accelerate",
        type=expand_home,
        metavar="FILE",
        help="read processes and engine from accelerate's configuration",
    )
    verb.add_argument(
        "--fit", action="store_true", help="change settings until the run fits, and say what each change saves"
    )


def add_train(verb: argparse.ArgumentParser) -> None:
    add_recipe(verb)
    verb.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in the recipe's output")
    verb.add_argument(
        "--force", action="store_true", help="train even if the plan says that the run cannot fit this GPU"
    )
    verb.add_argument(
        "--watch", action="store_true", help="serve a page that shows the run while it trains, to this machine alone"
    )


def add_watch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", metavar="RUN", type=expand_home, nargs="+", help="run directories, finished or training")
    way = verb.add_mutually_exclusive_group()
    way.add_argument("--port", type=int, default=0, metavar="N", help="port of the page (default: any free one)")
    way.add_argument(
        "-o", "--output", type=expand_home, metavar="FILE", help="write the page to a new file instead of serving it"
    )
    verb.add_argument(
        "--until-input-ends",
        action="store_true",
        help="wait for runs that have not begun, and stop serving when standard input ends",
    )


def add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "result", metavar="RUN", type=expand_home, help="a run directory, or an adapter folder that PEFT wrote"
    )
    _add_writing(verb)
    verb.add_argument(
        "--base",
        choices=("full", "dequantized", "auto"),
        default="full",
        help="what the adapter of a quantized run is merged into (default: full); auto takes the lower held-out loss",
    )
    verb.add_argument(
        "--base-model",
        metavar="FOLDER_OR_HUB_ID",
        help="the base of an adapter, where it has moved or the adapter names a quantized one",
    )
    verb.add_argument("--no-verify", action="store_true", help="do not reopen the export and compare its logits")
    verb.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapter alone, as plain LoRA for programs that apply adapters themselves (no other option but -o)",
    )
    verb.add_argument(
        "--gguf",
        action="append",
        default=[],
        metavar="TYPE",
        help=f"also write a GGUF file for llama.cpp and Ollama, in this type ({', '.join(_GGUF_TYPES)}); may be repeated",
    )

    verb.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload what was written to this repository of the hub, private unless --public",
    )
    verb.add_argument("--public", action="store_true", help="let everybody read the upload (with --push)")


def add_push(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "path", metavar="RUN_OR_EXPORT", type=expand_home, help="a run with an adapter, or a folder that export wrote"
    )
    verb.add_argument(
        "repository", metavar="OWNER/NAME", help="a repository of the hub; it is made where there is none"
    )
    verb.add_argument("--public", action="store_true", help="let everybody read it (default: only its owner)")


def add_average(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("models", metavar="RUN_OR_MODEL", nargs="+", help=RUN_OR_MODEL)
    _add_writing(verb)


def add_gguf(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="FOLDER", type=expand_home, help="a folder of Llama weights, such as an export")
    verb.add_argument(
        "-o", "--output", type=expand_home, required=True, metavar="FILE", help="a new file, such as mine-q8_0.gguf"
    )
    verb.add_argument("--type", required=True, metavar="TYPE", help=f"type of the weights: {', '.join(_GGUF_TYPES)}")
    verb.add_argument("--no-verify", action="store_true", help="do not compare the file with the folder")


def add_chat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    verb.add_argument("--prompt", metavar="TEXT", help="answer this prompt and exit")
    verb.add_argument("--system", metavar="TEXT", help="a system message")
    verb.add_argument(
        "--max-new-tokens", type=read_count, default=512, metavar="N", help="longest answer (default: 512)"
    )
    verb.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature (default: 0, the likeliest token)",
    )


def add_demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-o",
        "--output",
        type=expand_home,
        default=Path("runs/demo"),
        metavar="DIR",
        help="a new or empty folder (default: runs/demo)",
    )


def read_count(text: str) -> int:
    """Read a whole number above 0; argparse reports the error and exits with 2."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; found {text!r}")
    return int(text)
