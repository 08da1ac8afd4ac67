"""Check what every row must hold before it may be trained. Each fault is an error, never a warning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.errors import DataError, Place, TemplateError, describe_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a label holds where the token is not trained: PyTorch's cross entropy ignores this value.
IGNORED_LABEL = -100
_MOST_PLACES = 3


def check_padding(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]) -> None:
    """Refuse a padding token that is a stop token: its loss is masked, so the model would never learn to stop.

    Raises:
        TemplateError: the padding token is one of the stop tokens.
    """
    if tokenizer.pad_token_id in stop_tokens:
        raise TemplateError(
            f"the padding token {tokenizer.pad_token!r} is also a stop token; padding is never trained, so the model would "
            "never stop; use a tokenizer whose padding token is <pad>"
        )


def describe_row_fault(
    token_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int],
    *,
    is_cut: bool,
) -> str | None:
    """Return why a row must not be trained, or None.

    A row must have bos once, at its start; at least one trained token; and a stop token at the end of every answer. The last
    answer of a row that `is_cut` (by `data.overflow: truncate`) may lack its stop token; `SplitReport.answers_cut` counts these.
    `token_ids` and `labels` have shape `(tokens,)`.
    """
    if fault := describe_bos_fault(token_ids, tokenizer):
        return fault
    if all(label == IGNORED_LABEL for label in labels):
        return "has no trained token"
    for end in range(1, len(labels) + 1):
        is_answer_end = labels[end - 1] != IGNORED_LABEL and (end == len(labels) or labels[end] == IGNORED_LABEL)
        if is_answer_end and labels[end - 1] not in stop_tokens and not (is_cut and end == len(labels)):
            ending = tokenizer.convert_ids_to_tokens(labels[end - 1])
            expected = " or ".join(tokenizer.convert_ids_to_tokens(list(stop_tokens)))
            return f"an answer ends in {ending!r}, not in a stop token ({expected})"
    return None


def describe_bos_fault(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why a row does not have bos once, at its start, or None."""
    bos = tokenizer.bos_token_id
    count = token_ids.count(bos)
    if token_ids[0] == bos and count == 1:
        return None
    return f"holds {tokenizer.bos_token} {count} times, expected once at the start; remove it from the text or the template"


def check_rows(faults: Sequence[tuple[Place, str]]) -> None:
    """Raise one message for all faulty rows, given as `(place, fault)`.

    Raises:
        DataError: there is at least one faulty row.
    """
    if len(faults) == 1:
        place, fault = faults[0]
        raise DataError(fault, place)
    if faults:
        # The same fault is often in every row: it is said once.
        groups: dict[str, list[Place]] = {}
        for place, fault in faults:
            groups.setdefault(fault, []).append(place)
        lines = [f"  {_name_places(places)}: {fault}" for fault, places in groups.items()]
        more = f"\n  … and {len(lines) - 5:,} other faults" if len(lines) > 5 else ""
        shown = "\n".join(lines[:5])
        raise DataError(f"{describe_count(len(faults), 'row')} cannot be trained:\n{shown}{more}")


def _name_places(places: Sequence[Place]) -> str:
    """Return the first few of several places, and how many others there are."""
    near = [place.position for place in places[1:_MOST_PLACES] if place.file == places[0].file]
    others = len(places) - 1 - len(near)
    return ", ".join([str(places[0]), *near]) + (f" and {others:,} more" if others else "")
