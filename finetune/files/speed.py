"""Ways to save time that a reader would not expect, each with the benchmark that measures it."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Batch = TypeVar("Batch", bound=Sequence[object])


@contextmanager
def pause_garbage_search() -> Iterator[None]:
    """Stop Python's automatic search for reference cycles within the block.

    Python searches after every 700 new objects. Preparing rows makes millions of objects and no cycles, so the search takes a
    fifth of the time. Measured by `benchmarks/prepare.py` (the ways "finetune").
    Use it with `collect_between`, which bounds the memory of what cycles there are.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_between(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches, and search the young objects (generations 0 and 1) for cycles before each of them."""
    for batch in batches:
        gc.collect(1)
        yield batch
