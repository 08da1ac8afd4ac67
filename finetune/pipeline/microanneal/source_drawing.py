"""Read as many texts of each source of a micro-annealing as its tokens need, and the held-out texts with the names of their sources."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.check.data_section import find_file
from finetune.data.dataset import Splits, load_splits
from finetune.data.encoding.rendering import ChatTemplate
from finetune.data.reading.sources import measure_rows, name_source, read_source
from finetune.data.settings import DataSettings, Source
from finetune.errors import DataError, RecipeError
from finetune.mixtures.matched import match_sources
from finetune.mixtures.published import find_mixture
from finetune.pipeline.microanneal.anneal_plan import AnnealPlan
from finetune.training.training_rows import find_data_seed, open_data, read_data_settings

CANDIDATE = "candidate"
# Hardly any text has more bytes to a token, so that enough rows are drawn at the first try.
_MOST_BYTES = 8

Tokens = list[int]


@dataclass(frozen=True)
class NamedSource:
    """A source with its name, and its share of the old mixture or of the candidate."""

    name: str
    source: Source
    share: float


def list_sources(plan: AnnealPlan) -> list[NamedSource]:
    """Return the sources of the old mixture; their shares add up to 1.

    Raises:
        RecipeError: a source asks for a number of rows, or only some have a weight.
    """
    data, settings = plan.reading.recipe.data, read_data_settings(plan.reading)
    mixture = find_mixture(data.mixture) if data.mixture else None
    if mixture is not None:
        matched = match_sources(mixture, data.sources)
        pairs = zip(matched.shares.items(), settings.train, strict=True)
        return [NamedSource(name, source, share) for (name, share), source in pairs]
    weights = [source.weight for source in settings.train]
    problems = []
    if any(source.rows for source in settings.train):
        problems.append("data.train: takes no number of rows here, since --tokens says how much is read; give weights")
    if any(weights) and not all(weights):
        problems.append("data.train: only some files have a weight; give one to each, or to none")
    if problems:
        raise RecipeError("microanneal", problems)
    return share_by_weight(settings.train)


def list_candidates(plan: AnnealPlan) -> list[NamedSource]:
    """Return the files of the candidate; their shares add up to 1, by the bytes of their text."""
    encoding = plan.reading.recipe.data.encoding
    files = [find_file(str(file), Path.cwd()) for file in plan.request.candidate]
    return share_by_weight([Source(file, encoding=encoding) for file in files if file is not None])


def share_by_weight(sources: Sequence[Source]) -> list[NamedSource]:
    """Return sources with their names and shares: by their weights or, where they have none, by the bytes of their text."""
    names = [name_source(source) for source in sources]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise DataError(f"{twice}: is named twice; name each file once")
    sizes = [source.weight or float(sum(_measure_text(source))) for source in sources]
    if not sum(sizes):
        _raise_fault(sources[0])
    stems = [Path(name_source(source)).stem for source in sources]
    names = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)]
    total = sum(sizes)
    return [
        NamedSource(name, source, size / total)
        for name, source, size in zip(names, sources, sizes, strict=True)
        if size
    ]


def _raise_fault(source: Source) -> None:
    """Raise what is wrong with a source that has no text: the fault of its first row, if it has one.

    Raises:
        DataError: always.
    """
    rows = (row for _, part in read_source(source) for _, row in part)
    fault = next((row for row in rows if isinstance(row, DataError)), None)
    raise fault or DataError(f"{name_source(source)}: holds no text")


def _measure_text(source: Source) -> list[int]:
    return measure_rows(replace(source, weigh_text=True))


@dataclass(frozen=True)
class SourceDrawer:
    """Turns rows of single sources into token ids, as the recipe reads them; `notes` are what the data pipeline said of them."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    seed: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, plan: AnnealPlan) -> "SourceDrawer":
        """Open the tokenizer and the template of the recipe."""
        return cls(*open_data(plan.reading), find_data_seed(plan.reading.recipe))

    def draw(self, named: NamedSource, tokens: int) -> list[Tokens]:
        """Return texts of a source in random order: all of a small source, or enough for so many tokens.

        Raises:
            DataError: the source cannot be read.
        """
        sizes = _measure_text(named.source)
        rows, total = len(sizes), max(1, sum(sizes))
        wanted = math.ceil(rows * tokens * _MOST_BYTES / total)
        while True:
            taken = None if wanted >= rows else wanted
            splits = self._read(replace(named.source, rows=taken, weight=None, weigh_text=False))
            found = [row["input_ids"] for row in splits.train.select_columns(["input_ids"])]
            if taken is None or sum(map(len, found)) >= tokens:
                self.notes.extend(note for note in splits.report.notes if note not in self.notes)
                return random.Random(f"{self.seed} {named.name}").sample(found, len(found))
            wanted *= 2

    def _read(self, source: Source) -> Splits:
        """Return the rows that are taken of a source, as the recipe reads rows to train on."""
        settings = replace(self.settings, train=(source,), evaluation=(), held_out=0, notes=())
        return load_splits(settings, self.tokenizer, self.template, self.seed)

    def read_held_out(self) -> Iterator[tuple[str, Tokens]]:
        """Yield every row of the recipe's `data.eval` with its source: its own `source`, or the name of its file."""
        for source in self.settings.evaluation:
            names = {}
            for file, rows in read_source(source):
                for place, raw in rows:
                    own = None if isinstance(raw, DataError) else raw.get("source")
                    names[place.file, place.line] = str(own) if own else Path(file).stem
            for row in self._read(source).train.select_columns(["place", "input_ids"]):
                where = row["place"]
                yield names.get((where["file"], where["line"]), Path(where["file"]).stem), row["input_ids"]
