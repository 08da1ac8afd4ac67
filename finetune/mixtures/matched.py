"""Compute the shares of the user's own sources from the proportions of a published mixture.

The name of a source is that of a data set (`fineweb-edu`), a common first part of several names (`the-stack-v2`), or a category
(`code`). Every data set counts for the most specific name: with `{code: a, the-stack-v2/R: b}` R counts for `b` and not for `a`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from finetune.errors import find_close_match
from finetune.mixtures.categories import CATEGORIES, find_category, find_longest_part
from finetune.mixtures.published import Mixture, list_mixtures

_MOST_NAMED = 4


@dataclass(frozen=True)
class MatchedMixture:
    """The shares of the user's sources.

    `shares` add up to 1. `covered` is the share of the mixture's tokens that the sources stand for, and `left_out` names the
    data sets without a source.
    """

    mixture: Mixture
    shares: dict[str, float]
    covered: float
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Return a text with the shares, and with the data sets that are left out."""
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        if not self.left_out:
            return f"mixture {self.mixture.name}, all of it, by text: {shares}"
        named = ", ".join(self.left_out[:_MOST_NAMED])
        more = len(self.left_out) - _MOST_NAMED
        return (
            f"mixture {self.mixture.name}: your sources stand for {self.covered:.1%} of its tokens; scaled to 100%, by "
            f"text: {shares}. Left out: {len(self.left_out)} of {len(self.mixture.tokens)} data sets ({named}"
            f"{f' and {more} more' if more > 0 else ''})"
        )


def match_sources(mixture: Mixture, names: Collection[str]) -> MatchedMixture:
    """Assign every data set of a mixture to the most specific of `names`, and leave out those that fit no name."""
    found = dict.fromkeys(names, 0.0)
    left_out = []
    for dataset, share in mixture.shares.items():
        name = _find_owner(dataset, names)
        if name is None:
            left_out.append(dataset)
        else:
            found[name] += share
    covered = sum(found.values())
    shares = {name: share / covered for name, share in found.items() if share}
    return MatchedMixture(mixture, shares, covered, tuple(left_out))


def _find_owner(dataset: str, names: Collection[str]) -> str | None:
    owner = find_longest_part(dataset, names)
    category = find_category(dataset)
    return owner or (category if category in names else None)


def list_unknown_sources(mixture: Mixture, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield every name that stands for no data set of a mixture, with the reason."""
    shares = match_sources(mixture, names).shares
    for name in names:
        if name in shares:
            continue
        if match_sources(mixture, [name]).shares:
            yield name, f"other sources with more specific names cover all of it in {mixture.name}; remove it"
        elif phases := [other.name for other in list_mixtures() if match_sources(other, [name]).shares]:
            used = phases[0] if len(phases) == 1 else f"{len(phases)} others, {phases[0]} to {phases[-1]}"
            yield name, f"{mixture.name} has no such data; it is in {used}"
        else:
            match = find_close_match(name, _list_names(mixture))
            guess = f"did you mean {match!r}? " if match else ""
            yield name, f"unknown; {guess}`finetune mixtures --phase {mixture.phase}` lists the names"


def _list_names(mixture: Mixture) -> list[str]:
    parts = {"/".join(name.split("/")[:end]) for name in mixture.tokens for end in range(1, name.count("/") + 2)}
    return [*CATEGORIES, *sorted(parts)]
