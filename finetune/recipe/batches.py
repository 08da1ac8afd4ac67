"""How the rows of one optimizer step are split up; `trainer.auto` has the split, and what else decides about memory, found."""

from collections.abc import Iterator, Mapping

from finetune.recipe.methods import Method
from finetune.recipe.recipe_file import ACCUMULATION, BATCH, GLOBAL_BATCH, read_split_option
from finetune.recipe.sections import Recipe

# Keys of the section trainer that are the kit's own. What they lead to stands beside them in the resolved recipe.
AUTO = "auto"
KIT_OPTIONS = (AUTO, GLOBAL_BATCH)
DEFAULT_GLOBAL_BATCH = 32


def read_batch(recipe: Recipe) -> int:
    """Return the rows that a device computes at once."""
    return int(read_split_option(recipe.trainer, BATCH))


def read_accumulation(recipe: Recipe) -> int:
    """Return the batches of one optimizer step."""
    return int(read_split_option(recipe.trainer, ACCUMULATION))


def read_global_batch(recipe: Recipe) -> int:
    """Return the rows of one optimizer step over all processes, where `trainer.auto` splits them."""
    return int(recipe.trainer.get(GLOBAL_BATCH, DEFAULT_GLOBAL_BATCH))


def list_batch_problems(trainer: Mapping[str, object], method: Method) -> Iterator[str]:
    """Yield what is wrong with the kit's own keys of the section trainer."""
    is_auto, rows = trainer.get(AUTO, False), trainer.get(GLOBAL_BATCH, 1)
    if not isinstance(is_auto, bool):
        yield f"trainer.{AUTO}: must be true or false; found {is_auto!r}"
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        yield f"trainer.{GLOBAL_BATCH}: must be a whole number above 0; found {rows!r}"
    if GLOBAL_BATCH in trainer and not is_auto:
        yield f"trainer.{GLOBAL_BATCH}: is split up by auto: true; set that, or {BATCH} and {ACCUMULATION}"
    if is_auto is True and ACCUMULATION in trainer and BATCH not in trainer:
        yield f"trainer.{ACCUMULATION}: follows from {GLOBAL_BATCH} where auto is true; remove this key"
    if is_auto is True and method.is_pretraining:
        yield f"trainer.{AUTO}: the batch belongs to the schedule of {method.name}; set {BATCH} and {ACCUMULATION}"
