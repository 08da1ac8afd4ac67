"""Encode rows in several processes: the template is rendered in Python, which uses one core a process."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice

from finetune.data.encoding.row_encoder import BATCH_ROWS, RowEncoder, SourceRow, TokenRow
from finetune.data.formats.rows import Row
from finetune.errors import MachineError, Place
from finetune.files.launcher import hide_script

# The rows, how many spell control tokens, and the rows that the template refuses, each with its fault.
_Encoded = tuple[list[TokenRow], int, list[tuple[SourceRow, str]]]
# The encoder of a worker process. It is sent once, when the process starts, and not with every batch.
_own_encoder: list[RowEncoder] = []
_NOWHERE, _EMPTY_ROW = Place(""), Row()


def encode_rows(encoder: RowEncoder, rows: Iterable[SourceRow], workers: int) -> Iterator[list[TokenRow]]:
    """Yield batches of rows in their order, encoded by `workers` processes. With one worker, this process encodes them.

    Raises:
        MachineError: a process was ended from outside, most likely for lack of memory.
        TemplateError: as `RowEncoder.encode` says.
    """
    if workers == 1:
        yield from encoder.encode(rows)
        return
    remaining = iter(rows)
    pending: deque[tuple[list[SourceRow], Future[_Encoded]]] = deque()
    # A fork would copy the locks of torch's and the tokenizer's threads, and might copy them locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
        while batch := list(islice(remaining, BATCH_ROWS)):
            with hide_script():  # a process may start here
                pending.append((batch, pool.submit(_encode_batch, batch)))
            if len(pending) > 2 * workers:
                yield _finish(encoder, *pending.popleft())
        while pending:
            yield _finish(encoder, *pending.popleft())


def _start_worker(encoder: RowEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    _own_encoder.append(encoder)


def _encode_batch(batch: list[SourceRow]) -> _Encoded:
    """Return what `_Encoded` says. The rows are without their source, which need not be sent back."""
    encoder = _own_encoder[0]
    before, encoder.refused = encoder.rows_with_spellings, []
    rows = [row for rows in encoder.encode(batch) for row in rows]
    bare = [replace(row, source=SourceRow(row.source.number, _NOWHERE, row.source.kind, _EMPTY_ROW)) for row in rows]
    return bare, encoder.rows_with_spellings - before, encoder.refused


def _finish(encoder: RowEncoder, batch: list[SourceRow], future: Future[_Encoded]) -> list[TokenRow]:
    try:
        rows, spellings, refused = future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            "data.workers: a process that prepares rows was ended from outside, most likely for want of memory; "
            "set data.workers lower"
        ) from error
    encoder.rows_with_spellings += spellings
    encoder.refused += refused
    sources = {source.number: source for source in batch}
    return [replace(row, source=sources[row.source.number]) for row in rows]
