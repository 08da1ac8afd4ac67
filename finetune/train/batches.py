"""How the rows of one optimizer step are split up; `trainer.auto` has the split, and what else decides about memory, found."""

from finetune.recipe import Recipe

# Keys of the section trainer that are the kit's own. What they lead to stands beside them in the resolved recipe.
AUTO, GLOBAL_BATCH = "auto", "global_batch"
KIT_OPTIONS = (AUTO, GLOBAL_BATCH)
DEFAULT_GLOBAL_BATCH = 32
BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def read_batch(recipe: Recipe) -> int:
    """Return the rows that a device computes at once."""
    return int(recipe.trainer.get(BATCH, 8))


def read_accumulation(recipe: Recipe) -> int:
    """Return the batches of one optimizer step."""
    return int(recipe.trainer.get(ACCUMULATION, 1))


def read_global_batch(recipe: Recipe) -> int:
    """Return the rows of one optimizer step over all processes, where `trainer.auto` splits them."""
    return int(recipe.trainer.get(GLOBAL_BATCH, DEFAULT_GLOBAL_BATCH))
