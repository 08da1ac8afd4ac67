"""Find rows that are nearly the same by MinHash signatures, without keeping their texts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rensa import RMinHash, RMinHashLSH

SIMILAR = 0.8
_SLOTS, _BANDS, _SEED = 128, 16, 42
_WORDS_TOGETHER = 3
# Of fewer groups of words, one changed word decides everything.
_FEWEST_GROUPS = 10
_WORD = re.compile(r"[\u3400-\u9fff\u3041-\u30ff\uac00-\ud7af]|[^\W_]+")


def list_word_groups(text: str) -> list[str]:
    """Return all three words in a row, in lower case; a Chinese, Japanese or Korean letter is a word."""
    words = _WORD.findall(text.lower())
    return [" ".join(words[start : start + _WORDS_TOGETHER]) for start in range(len(words) - _WORDS_TOGETHER + 1)]


def sign_text(text: str) -> RMinHash | None:
    """Return the MinHash signature (128 slots of 4 bytes) of a text, or None where it is too short to compare."""
    groups = set(list_word_groups(text))
    if len(groups) < _FEWEST_GROUPS:
        return None
    signature = RMinHash(_SLOTS, _SEED)
    signature.update(sorted(groups))
    return signature


@dataclass
class NearIndex:
    """The signatures seen so far, by the place of their row.

    With 16 bands of 8 slots a pair whose word groups overlap by 0.8 is found 19 times in 20, one by 0.9 always but 1 in 10,000 times.
    """

    places: list[str] = field(default_factory=list)
    signatures: list[RMinHash] = field(default_factory=list)
    bands: RMinHashLSH = field(default_factory=lambda: RMinHashLSH(SIMILAR, _SLOTS, _BANDS))

    def find(self, signature: RMinHash) -> tuple[str, float] | None:
        """Return the place of the most similar row that is similar enough, with the estimated share, or None."""
        scored: Iterable[tuple[float, int]] = (
            (self.signatures[key].jaccard(signature), -key) for key in self.bands.query(signature)
        )
        share, key = max(scored, default=(0.0, 0))
        return (self.places[-key], share) if share >= SIMILAR else None

    def add(self, place: str, signature: RMinHash) -> None:
        """Remember a row."""
        self.bands.insert(len(self.places), signature)
        self.places.append(place)
        self.signatures.append(signature)
