"""Make a plan in a process of its own where several processes share a run.

A plan trains a model without content. With the launcher's variables in sight, accelerate would wrap it for DDP, FSDP2 or
DeepSpeed and exchange tensors that hold nothing.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from finetune.errors import FinetuneError
from finetune.files.launcher import hide_launcher, hide_script
from finetune.files.terminal import silence_libraries
from finetune.planning.forecast import Target
from finetune.runs.resolved_recipe import ResolvedRecipe

Found = TypeVar("Found")
Planner = Callable[[ResolvedRecipe, Target], Found]


def plan_apart(planner: Planner[Found], resolved: ResolvedRecipe, target: Target) -> Found:
    """Call a function of this room, such as `choose_settings`, where no launcher can be seen; return what it returns.

    Raises:
        FinetuneError: what the function raises.
    """
    if target.engine == "one":
        return planner(resolved, target)
    # The child must not inherit the variables: libraries read some of them when they are imported.
    context = multiprocessing.get_context("spawn")
    with hide_launcher(), hide_script(), ProcessPoolExecutor(1, context, initializer=silence_libraries) as pool:
        found, fault = pool.submit(_plan, planner, resolved, target).result()
    if fault is not None:
        raise FinetuneError(fault)
    return found  # type: ignore[return-value]


def _plan(planner: Planner[Found], resolved: ResolvedRecipe, target: Target) -> tuple[Found | None, str | None]:
    """Return what a planner finds, or the text of what it refuses: not every exception can be sent to another process."""
    try:
        return planner(resolved, target), None
    except FinetuneError as error:
        return None, str(error)
