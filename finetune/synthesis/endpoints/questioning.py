"""What a model is asked, and what comes back. A request is known by its content."""

import hashlib
import json
from dataclasses import asdict, dataclass

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """One question to a model: `(role, text)` of each turn, and how the answer is drawn.

    `number` tells apart several answers to one question.
    """

    turns: Turns
    max_tokens: int
    temperature: float
    number: int = 0

    def make_key(self, identity: str) -> str:
        """Return a hash of the request to a model; `identity` says which model it is."""
        content = json.dumps([identity, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def characters(self) -> int:
        """The length of all turns."""
        return sum(len(text) for _, text in self.turns)


@dataclass(frozen=True)
class Written:
    """An answer; `is_cut` says that it ended at `max_tokens`."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    is_cut: bool


@dataclass(frozen=True)
class Skip:
    """A request without an answer: a kind by which they are counted, and a text about this one."""

    kind: str
    text: str


Outcome = Written | Skip
