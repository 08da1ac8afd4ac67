"""Find rows that are nearly the same by MinHash signatures, without keeping their texts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rensa import RMinHash, RMinHashLSH

from finetune.errors import Place

SIMILAR = 0.8
_SLOTS, _SEED = 128, 42
# The share of similar texts that are found.
_FOUND = 0.94
_GROUP_WORDS = 3
# With fewer groups, a single changed word decides whether two texts are similar.
_FEWEST_GROUPS = 10
_WORD = re.compile(r"[\u3400-\u9fff\u3041-\u30ff\uac00-\ud7af]|[^\W_]+")


def list_word_groups(text: str, size: int = _GROUP_WORDS) -> list[str]:
    """Return every `size` consecutive words, in lower case. A Chinese, Japanese or Korean letter is a word."""
    words = _WORD.findall(text.lower())
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


def list_compared_groups(text: str, size: int = _GROUP_WORDS) -> list[str]:
    """Return the different word groups by which a text is compared, sorted; none for a text that is too short."""
    groups = set(list_word_groups(text, size))
    return sorted(groups) if len(groups) >= _FEWEST_GROUPS else []


def sign_text(text: str, size: int = _GROUP_WORDS, slots: int = _SLOTS) -> RMinHash | None:
    """Return the MinHash signature of a text's word groups, or None for a text that is too short to compare.

    A signature has `slots` slots of 4 bytes.
    """
    groups = list_compared_groups(text, size)
    if not groups:
        return None
    signature = RMinHash(slots, _SEED)
    signature.update(groups)
    return signature


def choose_bands(similar: float, slots: int) -> int:
    """Return how many bands a signature is cut into: as few as find texts that share `similar` 94 times in 100.

    Two signatures meet where all slots of one band are equal: with probability 1 - (1 - s ** r) ** b for a share s of equal slots and
    b bands of r slots. Fewer bands find fewer texts that share less.

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    for bands in (number for number in range(1, slots + 1) if slots % number == 0):
        if 1 - (1 - similar ** (slots // bands)) ** bands >= _FOUND:
            return bands
    return slots


@dataclass
class NearIndex:
    """The signatures of the rows so far, with their places and a hash of what they hold beside their texts, their context.

    With the defaults, signatures have 16 bands of 8 slots. Two texts that share 0.8 of their word groups are found 19 times in 20;
    two that share 0.9 are missed once in 10,000 times.
    """

    similar: float = SIMILAR
    slots: int = _SLOTS
    places: list[Place] = field(default_factory=list)
    contexts: list[bytes] = field(default_factory=list)
    signatures: list[RMinHash] = field(default_factory=list)
    bands: RMinHashLSH = field(init=False)

    def __post_init__(self) -> None:
        self.bands = RMinHashLSH(self.similar, self.slots, choose_bands(self.similar, self.slots))

    def find(self, signature: RMinHash, context: bytes | None = None) -> tuple[Place, float] | None:
        """Return the place of the most similar row and the estimated share of word groups, or None below `similar`.

        With a context, only rows that have the same one are looked at.
        """
        keys = (key for key in self.bands.query(signature) if context in (None, self.contexts[key]))
        scored: Iterable[tuple[float, int]] = ((self.signatures[key].jaccard(signature), -key) for key in keys)
        share, key = max(scored, default=(0.0, 0))
        return (self.places[-key], share) if share >= self.similar else None

    def add(self, place: Place, signature: RMinHash, context: bytes = b"") -> None:
        """Remember a row."""
        self.bands.insert(len(self.places), signature)
        self.places.append(place)
        self.contexts.append(context)
        self.signatures.append(signature)
