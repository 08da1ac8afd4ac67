"""A person's own files in the proportions of a published mixture.

A name is a data set (`fineweb-edu`), the first parts of several (`the-stack-v2` is all below it), or a category (`code`). Every
data set belongs to the most specific name, so that `{code: a, the-stack-v2/R: b}` leaves R out of `a`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from finetune.errors import find_close_match
from finetune.mixtures.categories import CATEGORIES, find_category, find_longest_part
from finetune.mixtures.published import Mixture, list_mixtures

_MOST_NAMED = 4


@dataclass(frozen=True)
class MatchedMixture:
    """The shares of the names that a person has files for, adding up to 1; `covered` is their share of the whole mixture."""

    mixture: Mixture
    shares: dict[str, float]
    covered: float
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Return what is trained on, and what is left out, as sentences."""
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        if not self.left_out:
            return f"mixture {self.mixture.name}, all of it, by text: {shares}"
        named = ", ".join(self.left_out[:_MOST_NAMED])
        more = len(self.left_out) - _MOST_NAMED
        return (
            f"mixture {self.mixture.name}: your sources stand for {self.covered:.1%} of its tokens; renormalised to the whole, by "
            f"text: {shares}. Left out: {len(self.left_out)} of {len(self.mixture.tokens)} data sets ({named}"
            f"{f' and {more} more' if more > 0 else ''})"
        )


def match_sources(mixture: Mixture, names: Collection[str]) -> MatchedMixture:
    """Give every data set of a mixture to the most specific of `names`, and let those without one go."""
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
    """Yield every name that stands for nothing in a mixture, with the reason."""
    shares = match_sources(mixture, names).shares
    for name in names:
        if name in shares:
            continue
        if match_sources(mixture, [name]).shares:
            yield name, f"all that it stands for in {mixture.name} has a more specific name here; remove it"
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
