"""Write the rows of both runs of a micro-annealing, in the shares of tokens that are asked for, and the held-out rows.

The rows of the old mixture in the run with the candidate are the first of those in the run without it.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from finetune.data.reading.sources import hash_source
from finetune.errors import DataError, OutputError, describe_count
from finetune.files.folders import write_folder
from finetune.files.json_files import read_json, write_json
from finetune.pipeline.microanneal.anneal_plan import NEW, OLD, ROWS_FOLDER, AnnealPlan
from finetune.pipeline.microanneal.source_drawing import (
    CANDIDATE,
    NamedSource,
    SourceDrawer,
    Tokens,
    list_candidates,
    list_sources,
)
from finetune.recipe.sections import to_plain
from finetune.training.training_rows import read_data_settings

HELD_OUT = "held_out"
_REPORT_FILE = "rows.json"
# Source: Muennighoff et al., arXiv 2305.16264: tokens that are read about 16 times teach next to nothing when they are read again.
_MOST_EPOCHS = 16
_FEWEST_HELD_OUT = 2


@dataclass(frozen=True)
class SourceAccount:
    """What there is of a source (a part of a large one), and how often each run reads it, by the name of the run."""

    name: str
    share: float
    documents: int
    tokens: int
    held_out: int
    left_out: int
    epochs: Mapping[str, float]

    def describe(self) -> str:
        """Return a sentence for a person."""
        read = " and ".join(f"{count:.2f} times in the run {arm}" for arm, count in self.epochs.items())
        facts = f"{describe_count(self.documents, 'text')} of {self.tokens:,} tokens, read {read}"
        if self.left_out:
            facts += f"; {describe_count(self.left_out, 'text')} left out, as held-out rows are the same"
        return f"{self.name} ({self.share:.1%}): {facts}"


@dataclass(frozen=True)
class HeldOutRow:
    """A held-out text as token ids. What is kept apart of the candidate itself is not `counted` in the verdict."""

    source: str
    token_ids: Tokens
    counted: bool = True


@dataclass(frozen=True)
class AnnealRows:
    """The folder with the rows of both runs, the held-out rows (`cut` of them at the longest), and what there is of each source."""

    folder: Path
    held_out: tuple[HeldOutRow, ...]
    cut: int
    accounts: tuple[SourceAccount, ...]
    notes: tuple[str, ...]

    def find_file(self, name: str) -> Path:
        """Return the file of a run's rows, or of those held-out rows that count."""
        return self.folder / f"{name}.parquet"


def prepare_anneal_rows(plan: AnnealPlan) -> AnnealRows:
    """Draw the rows, or take those that an earlier call drew of the same files.

    Raises:
        FinetuneError: a source cannot be read or holds too little, or the folder holds rows of other files or settings.
    """
    folder = plan.request.output / ROWS_FOLDER
    old, new = list_sources(plan), list_candidates(plan)
    identity = _identify(plan, [*old, *new])
    if (folder / _REPORT_FILE).is_file():
        if (read_json(folder / _REPORT_FILE) or {}).get("identity") != identity:
            raise OutputError(
                f"{plan.request.output}: holds a micro-annealing of other files, tokens or settings of the rows; choose another folder "
                "with -o, or remove it"
            )
    else:
        with write_folder(folder) as partial:
            _write_rows(plan, old, new, partial, identity)
    return _read_rows(folder)


def _identify(plan: AnnealPlan, sources: Sequence[NamedSource]) -> str:
    recipe = to_plain(plan.reading.recipe)
    held = [hash_source(source) for source in read_data_settings(plan.reading).evaluation]
    parts = {
        "recipe": {key: recipe[key] for key in ("data", "seed")},
        "checkpoint": recipe["model"]["checkpoint"],
        "request": [plan.tokens, plan.step_tokens, plan.request.share],
        "sources": [(named.name, named.share, hash_source(named.source)) for named in sources],
        "held_out": held,
    }
    return hash_content(parts)


def hash_content(content: Any) -> str:
    """Return a hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Drawn:
    """The texts of a source: `held` of them are kept apart, `texts` are trained on, so many tokens in each run as `wanted` says."""

    named: NamedSource
    name: str
    counted: bool
    share: float
    wanted: Mapping[str, int]
    held: list[Tokens]
    texts: list[Tokens]


def _write_rows(
    plan: AnnealPlan, old: Sequence[NamedSource], new: Sequence[NamedSource], folder: Path, identity: str
) -> None:
    """Draw and write all rows: every source gives its tokens to the run of the old mixture, to that with the candidate, or to both."""
    drawer, share = SourceDrawer.open(plan), plan.request.share
    held = [HeldOutRow(source, ids) for source, ids in drawer.read_held_out()]
    shares = [(named, True, {OLD: named.share, NEW: named.share * (1 - share)}) for named in old]
    shares += [(named, False, {NEW: named.share * share}) for named in new]
    drawn = [_draw(plan, drawer, *one) for one in shares]
    held += [HeldOutRow(one.name, ids, one.counted) for one in drawn for ids in one.held]
    rows: dict[str, list[Tokens]] = {OLD: [], NEW: []}
    # Only when all sources are drawn it is known which texts are held out; a text may stand in several sources.
    accounts = [_share_out(one, held, rows, drawer.seed) for one in drawn]
    limit = plan.reading.recipe.data.max_tokens
    cut = sum(len(row.token_ids) > limit for row in held)
    held = [HeldOutRow(row.source, row.token_ids[:limit], row.counted) for row in held if len(row.token_ids) > 1]
    for arm, texts in rows.items():
        _write_parquet(folder / f"{arm}.parquet", texts)
    _write_parquet(folder / f"{HELD_OUT}.parquet", [row.token_ids for row in held if row.counted])
    written = {
        "identity": identity,
        "sources": [asdict(one) for one in accounts],
        "cut": cut,
        "notes": list(drawer.notes),
        "held_out": [asdict(row) for row in held],
    }
    write_json(folder / _REPORT_FILE, written)


def _draw(
    plan: AnnealPlan, drawer: SourceDrawer, named: NamedSource, counted: bool, shares: Mapping[str, float]
) -> _Drawn:
    """Draw the texts of a source, and keep some apart where the recipe names no held-out rows."""
    wanted = {arm: math.ceil(plan.tokens * part) for arm, part in shares.items()}
    texts = drawer.draw(named, math.ceil(max(wanted.values()) * (1 + _share_held_out(plan))))
    count = 0 if drawer.settings.evaluation else _count_held_out(plan, texts)
    name = named.name if counted else CANDIDATE
    part = named.share if counted else named.share * plan.request.share
    return _Drawn(named, name, counted, part, wanted, texts[:count], texts[count:])


def _share_out(drawn: _Drawn, held: Sequence[HeldOutRow], rows: Mapping[str, list[Tokens]], seed: int) -> SourceAccount:
    """Append the tokens of a source to the rows of the runs, without any text that is held out.

    Raises:
        DataError: the source holds too little.
    """
    kept = _leave_out_held(drawn.texts, held)
    tokens = sum(map(len, kept))
    for arm, number in drawn.wanted.items():
        _check_epochs(drawn.named, tokens, number, kept_apart=len(drawn.held))
        rows[arm].extend(_repeat(kept, number, seed))
    epochs = {arm: number / tokens for arm, number in drawn.wanted.items()}
    own = sum(row.source == drawn.name for row in held)
    return SourceAccount(drawn.named.name, drawn.share, len(kept), tokens, own, len(drawn.texts) - len(kept), epochs)


def _share_held_out(plan: AnnealPlan) -> float:
    held = plan.reading.recipe.data.held_out
    return held if isinstance(held, float) else 0.0


def _count_held_out(plan: AnnealPlan, texts: Sequence[Tokens]) -> int:
    """Return how many of a source's texts are kept apart: the share or the number of `data.held_out`, of each source."""
    held = plan.reading.recipe.data.held_out
    return max(_FEWEST_HELD_OUT, held if isinstance(held, int) else round(held * len(texts)))


def _leave_out_held(texts: Sequence[Tokens], held: Sequence[HeldOutRow]) -> list[Tokens]:
    known = {tuple(row.token_ids) for row in held}
    return [ids for ids in texts if tuple(ids) not in known and len(ids) > 1]


def _check_epochs(named: NamedSource, tokens: int, wanted: int, kept_apart: int) -> None:
    """Check that a source holds enough.

    Raises:
        DataError: it would be read too often.
    """
    if not tokens and not kept_apart:
        raise DataError(
            f"{named.name}: nothing is left to train on: each of its rows is also a held-out row, or has no token to predict; give other "
            "rows, or other rows with --held-out"
        )
    if tokens * _MOST_EPOCHS < wanted:
        held = f" beside {describe_count(kept_apart, 'held-out text')}" if kept_apart else ""
        raise DataError(
            f"{named.name}: holds {describe_count(tokens, 'token')} to train on{held}, of which {wanted:,} are asked for; tokens that are read "
            f"more than {_MOST_EPOCHS} times teach next to nothing, so the comparison would say little. Lower --tokens or --share, give more "
            "rows, or leave this source out"
        )


def _repeat(texts: Sequence[Tokens], wanted: int, seed: int) -> Iterator[Tokens]:
    """Yield texts until there are so many tokens: every text once, then all again in another order. The last one is cut."""
    epoch = 0
    while wanted > 0:
        order = texts if not epoch else random.Random(f"{seed} {epoch}").sample(texts, len(texts))
        for ids in order:
            if wanted <= 0:
                break
            yield ids[: max(2, wanted)]  # a row needs two tokens
            wanted -= len(ids)
        epoch += 1


def _write_parquet(file: Path, texts: Sequence[Tokens]) -> None:
    table = pyarrow.table({"input_ids": pyarrow.array(texts, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, file)


def _read_rows(folder: Path) -> AnnealRows:
    written = read_json(folder / _REPORT_FILE)
    held = tuple(HeldOutRow(**row) for row in written["held_out"])
    accounts = tuple(SourceAccount(**one) for one in written["sources"])
    return AnnealRows(folder, held, written["cut"], accounts, tuple(written["notes"]))
