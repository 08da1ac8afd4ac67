"""Measure the comparison of an export at full size, and compare it with a comparison of whole models in memory: time, memory, figures.

    python benchmarks/verification.py [--folder DIR] [--layers 56] [--dtype bfloat16] [--skip-whole]

It makes a random checkpoint with YuLan-Mini's real sizes and a rank-16 adapter, as export.py does, and exports it without and with
the comparison. The last line is the plain way, on the same rows: the base in float32 with PEFT's live adapter is loaded whole, then the
export. CPU time is that of the whole process, because other programs may share the cores. The benchmark needs 20 GB of disk and, for
the last line, 13 GB of memory. It writes verification.md and verification.json beside this file.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
from export import make_inputs, measure_all_of
from peft import PeftModel
from transformers import LlamaForCausalLM

from finetune.exporting.comparing.outputs import (
    cut_rows,
    measure_agreement,
    measure_difference,
    measure_kl,
    run_rows,
)
from finetune.exporting.merged import open_subject
from finetune.exporting.verify import list_rows
from finetune.runs.results import open_result

WRITE, COMPARE, WHOLE = (
    "finetune export --no-verify",
    "finetune export, compared",
    "whole models in memory (transformers, PEFT)",
)
FIGURES = ("max_abs", "kl", "top1_agreement")


def compare_whole(base: Path, adapter: Path, export: Path) -> dict[str, float]:
    """Run the model that was trained and the export, each whole in memory, and compare their logits."""
    rows = cut_rows(list_rows(open_subject(open_result(adapter))))
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = run_rows(PeftModel.from_pretrained(model, adapter).eval(), rows).logits
    del model
    exported = run_rows(LlamaForCausalLM.from_pretrained(export, dtype=torch.float32).eval(), rows).logits
    figures = (measure_difference, measure_kl, measure_agreement)
    return {name: figure(trained, exported) for name, figure in zip(FIGURES, figures, strict=True)}


def measure_everything(folder: Path, dtype: str, *, skips_whole: bool) -> dict[str, dict[str, float]]:
    """Run the three commands in turn; the last one reads what the second has written."""
    adapter, output = str(folder / "adapter"), folder / "output"
    export = [sys.executable, "-m", "finetune", "export", adapter, "-o", str(output), "--dtype", dtype]
    plain = [
        sys.executable,
        __file__,
        "--whole",
        *(str(folder / name) for name in ("llama", "adapter", "output", "whole.json")),
    ]
    found: dict[str, dict[str, float]] = {}
    for name, command, made in (
        (WRITE, [*export, "--no-verify"], output),
        (COMPARE, export, output),
        (WHOLE, plain, folder / "-"),
    ):
        if name == WHOLE and skips_whole:
            continue
        seconds, peak, cpu = measure_all_of(command, made)
        found[name] = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "bytes": peak}
        print(f"{name:45} {seconds:7.1f} s {cpu:7.1f} s of CPU {peak / 1e9:6.2f} GB", file=sys.stderr)
    found[COMPARE] |= json.loads((output / "export.json").read_text())["verify"]
    if WHOLE in found:
        found[WHOLE] |= json.loads((folder / "whole.json").read_text())
    return found


def describe(found: dict[str, dict[str, float]], layers: int, dtype: str) -> str:
    """Return the table in Markdown."""
    compared = found[COMPARE]
    lines = [
        f"{layers} layers of YuLan-Mini's size, {dtype}; {os.cpu_count()} cores ({platform.machine()}, {torch.get_num_threads()} threads), "
        f"Python {platform.python_version()}, torch {torch.__version__}. Whole processes, once, other programs beside them.",
        "",
        "| | wall time, s | CPU time, s | peak memory, GB | largest difference of a logit | KL, nats | same likeliest token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        figures = (
            "| | |" if "kl" not in row else f"{row['max_abs']:.3e} | {row['kl']:.3e} | {row['top1_agreement']:.1%} |"
        )
        lines.append(
            f"| {name} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['bytes'] / 1e9:.2f} | {figures}"
        )
    rounding = compared["rounding_kl"]
    explained = (
        "" if rounding is None else f" Random errors of at most half a step of {dtype} give a KL of {rounding:.3e}."
    )
    lines += [
        "",
        f"{compared['positions']} positions of {compared['rows']} rows.{explained} The adapter itself moves its base by a KL of "
        f"{compared['effect_kl']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark, or with `--whole` only the plain comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skip-whole", action="store_true", help="leave out the whole models")
    parser.add_argument(
        "--whole", nargs=4, type=Path, metavar=("BASE", "ADAPTER", "EXPORT", "REPORT"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.whole:
        *folders, report = arguments.whole
        report.write_text(json.dumps(compare_whole(*folders)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "adapter").is_dir():
            make_inputs(folder, arguments.layers)
        found = measure_everything(folder, arguments.dtype, skips_whole=arguments.skip_whole)
    table = describe(found, arguments.layers, arguments.dtype)
    print(table)
    (arguments.output / "verification.md").write_text(table, encoding="utf-8")
    (arguments.output / "verification.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
