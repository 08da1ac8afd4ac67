"""Optimisations that a reader would not expect. Each says how much it saves, and which benchmark measures it."""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_NO_COMPILER = "TORCHDYNAMO_DISABLE"
Batch = TypeVar("Batch", bound=Sequence[object])


@contextmanager
def pause_garbage_search() -> Iterator[None]:
    """Stop Python's automatic search for reference cycles within the block.

    Python searches after every 700 new objects. Preparing rows makes millions of objects and hardly any cycles, so nearly all
    of these searches find nothing. Use it with `collect_between`, which bounds the memory that remaining cycles hold.

    The lines "finetune" of `benchmarks/prepare.py` are measured with it. It saved 7 % for 15,000 rows on one core: 5.75 s of CPU
    time with it and 6.19 s without (medians of five runs).
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


@contextmanager
def load_for_plan() -> Iterator[None]:
    """Import within the block what a plan needs: without torch's compiler, and without searches for garbage.

    bitsandbytes loads the compiler for kernels that a plan never runs. What is loaded stays until the process ends, so that
    searching it for garbage, then and later, finds nothing. `benchmarks/plan.py` is measured with it.
    """
    asked = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with pause_garbage_search():
            yield
            gc.freeze()
    finally:
        if asked is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = asked
