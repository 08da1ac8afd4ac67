"""From what a recipe says about its rows to the sources that are read."""

from dataclasses import replace
from pathlib import Path

from finetune.data.settings import HubDataset, Source
from finetune.mixtures.matched import match_sources
from finetune.mixtures.published import find_mixture
from finetune.recipe.sections import DataSection, SourceSection


def read_source_section(source: str | SourceSection) -> Source:
    """Return one source of a checked recipe."""
    if isinstance(source, str):
        return Source(Path(source))
    is_hub = bool(source.hub)
    hub = HubDataset(source.hub, source.config, source.split or "train", source.revision)
    return Source(hub if is_hub else Path(source.path), source.weight, source.rows)


def read_training_sources(data: DataSection) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Return the sources that a checked recipe trains on, and what a person should know of them.

    The shares of a published mixture become weights, counted in text: the authors counted tokens, not rows.
    """
    mixture = find_mixture(data.mixture) if data.mixture else None
    if mixture is None:
        return tuple(map(read_source_section, data.train)), ()
    matched = match_sources(mixture, data.sources)
    sources = tuple(
        replace(read_source_section(data.sources[name]), weight=share, weigh_text=True)
        for name, share in matched.shares.items()
    )
    return sources, (matched.describe(),)
