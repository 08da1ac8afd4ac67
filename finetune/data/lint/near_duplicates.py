"""Find rows that are nearly the same by MinHash signatures, without keeping their texts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rensa import RMinHash, RMinHashLSH

from finetune.errors import Place

SIMILAR = 0.8
_SLOTS, _BANDS, _SEED = 128, 16, 42
_GROUP_WORDS = 3
# With fewer groups, a single changed word decides whether two texts are similar.
_FEWEST_GROUPS = 10
_WORD = re.compile(r"[\u3400-\u9fff\u3041-\u30ff\uac00-\ud7af]|[^\W_]+")


def list_word_groups(text: str) -> list[str]:
    """Return every three consecutive words, in lower case. A Chinese, Japanese or Korean letter is a word."""
    words = _WORD.findall(text.lower())
    return [" ".join(words[start : start + _GROUP_WORDS]) for start in range(len(words) - _GROUP_WORDS + 1)]


def sign_text(text: str) -> RMinHash | None:
    """Return the MinHash signature of a text (128 slots of 4 bytes), or None for a text that is too short to compare."""
    groups = set(list_word_groups(text))
    if len(groups) < _FEWEST_GROUPS:
        return None
    signature = RMinHash(_SLOTS, _SEED)
    signature.update(sorted(groups))
    return signature


@dataclass
class NearIndex:
    """The signatures of the rows so far, with their places and a hash of what they hold beside their texts, their context.

    The signatures have 16 bands of 8 slots. Two texts that share 0.8 of their word groups are found 19 times in 20; two that
    share 0.9 are missed once in 10,000 times.
    """

    places: list[Place] = field(default_factory=list)
    contexts: list[bytes] = field(default_factory=list)
    signatures: list[RMinHash] = field(default_factory=list)
    bands: RMinHashLSH = field(default_factory=lambda: RMinHashLSH(SIMILAR, _SLOTS, _BANDS))

    def find(self, signature: RMinHash, context: bytes | None = None) -> tuple[Place, float] | None:
        """Return the place of the most similar row and the estimated share of word groups, or None below `SIMILAR`.

        With a context, only rows that have the same one are looked at.
        """
        keys = (key for key in self.bands.query(signature) if context in (None, self.contexts[key]))
        scored: Iterable[tuple[float, int]] = ((self.signatures[key].jaccard(signature), -key) for key in keys)
        share, key = max(scored, default=(0.0, 0))
        return (self.places[-key], share) if share >= SIMILAR else None

    def add(self, place: Place, signature: RMinHash, context: bytes = b"") -> None:
        """Remember a row."""
        self.bands.insert(len(self.places), signature)
        self.places.append(place)
        self.contexts.append(context)
        self.signatures.append(signature)
