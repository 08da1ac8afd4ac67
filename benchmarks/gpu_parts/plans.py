"""Plan every case on the processor, in several processes at once; started by gpu.py beside the measurements."""

import argparse
import concurrent.futures
import os
import tempfile
from pathlib import Path
from typing import Any

from gpu_parts.cases import Case, list_cases, list_overrides, write_rows
from gpu_parts.lines import explain, is_measured, read_lines, write_line
from gpu_parts.settings import wait_for_base

from finetune.check.recipes import load_recipe
from finetune.files.resources import list_all_recipes
from finetune.planning.forecast import ROUNDING, Target, make_plan
from finetune.planning.hardware import CUBLAS_BYTES


def plan_case(case: Case, base: Path) -> dict[str, Any]:
    """Return what `finetune plan` says of a case on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = list_overrides(case, base, write_rows(Path(folder), case, base), Path(folder) / "run")
        plan = make_plan(load_recipe(list_all_recipes()[case.recipe], overrides), Target(is_gpu=True))
    allocated = plan.tensor_bytes + plan.parts[ROUNDING] + CUBLAS_BYTES
    return {"peak": plan.peak_bytes, "allocated": allocated, "phase": plan.peak_phase, "parts": dict(plan.parts)}


def main() -> None:
    """Plan all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only what the output does not hold yet")
    arguments = parser.parse_args()
    known = {row["name"] for row in read_lines(arguments.output) if is_measured(row)} if arguments.missing else set()
    cases = [case for case in list_cases(arguments.rehearse) if case.name not in known]
    wait_for_base(arguments.base)
    processes = max(1, (os.cpu_count() or 2) // 4)
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(plan_case, case, arguments.base): case.name for case in cases}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            values = {"error": explain(error)} if error else future.result()
            write_line(arguments.output, {"name": futures[future], **values})


if __name__ == "__main__":
    main()
