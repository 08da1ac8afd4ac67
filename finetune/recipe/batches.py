"""The batch sizes of a recipe: micro-batch size, accumulation steps and effective batch size.

With `trainer.auto: true` the kit picks the first two, and other settings that decide about memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import (
    ACCUMULATION,
    BATCH,
    CHECKPOINTING,
    CHECKPOINTING_OPTIONS,
    EVERY_N_LAYERS,
    GLOBAL_BATCH,
    NEWER_NAMES,
    read_split_option,
)
from finetune.recipe.sections import Recipe

# Keys of the section trainer that belong to the kit and not to the trainer's configuration class. In the resolved recipe the
# options that `auto` picks stand beside them.
AUTO = "auto"
EARLY_STOPPING = "early_stopping_patience"
KIT_OPTIONS = (AUTO, GLOBAL_BATCH, EARLY_STOPPING)
DEFAULT_GLOBAL_BATCH = 32


def read_checkpointing(trainer: Mapping[str, Any]) -> int:
    """Return n where every n-th layer has gradient checkpointing, and 0 where none has."""
    if not _read_by_either_name(trainer, CHECKPOINTING, True):
        return 0
    return int(read_checkpointing_options(trainer).get(EVERY_N_LAYERS, 1))


def read_checkpointing_options(trainer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return transformers' options for gradient checkpointing; a value of another type is a problem that others find."""
    options = _read_by_either_name(trainer, CHECKPOINTING_OPTIONS)
    return options if isinstance(options, Mapping) else {}


def _read_by_either_name(trainer: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return trainer.get(name, trainer.get(NEWER_NAMES[name], default))


def list_checkpointing_problems(trainer: Mapping[str, Any], method: Method) -> Iterator[str]:
    """Yield the problems with gradient checkpointing of every n-th layer."""
    every = read_checkpointing_options(trainer).get(EVERY_N_LAYERS, 1)
    key = f"trainer.{CHECKPOINTING_OPTIONS}.{EVERY_N_LAYERS}"
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        yield f"{key}: must be a whole number above 0; found {every!r}"
    elif every > 1 and method.toggles_checkpointing:
        yield f"{key}: {method.name} has gradient checkpointing of all layers or none; remove this key"


def read_batch(recipe: Recipe) -> int:
    """Return the micro-batch size: rows for each device and forward pass."""
    return int(read_split_option(recipe.trainer, BATCH))


def read_accumulation(recipe: Recipe) -> int:
    """Return the number of micro-batches in one optimizer step."""
    return int(read_split_option(recipe.trainer, ACCUMULATION))


def read_global_batch(recipe: Recipe) -> int:
    """Return the effective batch size in rows, over all processes, which `trainer.auto` splits into micro-batches."""
    return int(recipe.trainer.get(GLOBAL_BATCH, DEFAULT_GLOBAL_BATCH))


def list_batch_problems(trainer: Mapping[str, object], method: Method) -> Iterator[str]:
    """Yield the problems with the kit's own keys of the section trainer."""
    is_auto, rows = trainer.get(AUTO, False), trainer.get(GLOBAL_BATCH, 1)
    if not isinstance(is_auto, bool):
        yield f"trainer.{AUTO}: must be true or false; found {is_auto!r}"
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        yield f"trainer.{GLOBAL_BATCH}: must be a whole number above 0; found {rows!r}"
    patience = trainer.get(EARLY_STOPPING, 1)
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        yield f"trainer.{EARLY_STOPPING}: must be a whole number of evaluations above 0; found {patience!r}"
    if GLOBAL_BATCH in trainer and not is_auto:
        yield f"trainer.{GLOBAL_BATCH}: needs auto: true; set that, or set {BATCH} and {ACCUMULATION} instead"
    if is_auto is True and ACCUMULATION in trainer and BATCH not in trainer:
        yield f"trainer.{ACCUMULATION}: with auto: true it follows from {GLOBAL_BATCH}; remove this key"
    if is_auto is True and method.is_pretraining:
        yield (
            f"trainer.{AUTO}: does not work for {method.name}, whose schedule depends on the batch; remove this key and set "
            f"{BATCH} and {ACCUMULATION}"
        )
