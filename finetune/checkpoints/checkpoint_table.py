"""The table of published YuLan-Mini checkpoints, which a run can take as its base checkpoint.

Source: the authors' repository RUC-GSAI/YuLan-Mini and the technical report (arXiv 2412.17743); the scores are theirs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PHASE_TOKENS = 40_000_000_000
# The rows of each task behind a published score: the test splits. HumanEval has 20 samples for each of its rows.
SCORED_ROWS: Mapping[str, int] = {"lambada": 5153, "gsm8k": 1319, "humaneval": 164}
Architecture = Literal["llama", "yulanmini"]


@dataclass(frozen=True)
class Checkpoint:
    """One base checkpoint; scores are percentages as published, `context` is in tokens."""

    alias: str
    repository: str | None
    stage: str
    phase: int | None
    context: int
    optimizer_states: bool
    architecture: Architecture
    lambada: float | None = None
    gsm8k: float | None = None
    humaneval: float | None = None
    note: str = ""

    @property
    def tokens(self) -> int | None:
        """The tokens of pre-training up to its phase, or None where it stands at the end of no phase."""
        return 0 if self.stage == "untrained" else None if self.phase is None else self.phase * PHASE_TOKENS

    @property
    def scores(self) -> dict[str, float]:
        """The published scores, in percent, by the names of their tasks."""
        scores = {"lambada": self.lambada, "gsm8k": self.gsm8k, "humaneval": self.humaneval}
        return {task: score for task, score in scores.items() if score is not None}

    @property
    def has_published_sizes(self) -> bool:
        """Whether its sizes are `PUBLISHED_SIZES`."""
        return self.alias != "nano"


CHECKPOINTS: tuple[Checkpoint, ...] = (
    Checkpoint("phase5", "yulan-team/YuLan-Mini-Phase5", "stable", 5, 4096, False, "yulanmini", 53.85, 3.41, 12.26),
    Checkpoint("phase10", "yulan-team/YuLan-Mini-Phase10", "stable", 10, 4096, False, "yulanmini", 55.00, 9.57, 15.95),
    Checkpoint("phase15", "yulan-team/YuLan-Mini-Phase15", "stable", 15, 4096, False, "yulanmini", 55.81, 13.81, 16.99),
    Checkpoint("phase20", "yulan-team/YuLan-Mini-Phase20", "stable", 20, 4096, True, "yulanmini", 55.81, 21.39, 20.79),
    Checkpoint("phase25", "yulan-team/YuLan-Mini-Phase25", "stable", 25, 4096, True, "yulanmini", 55.67, 29.94, 34.06),
    Checkpoint(
        "before-annealing",
        "yulan-team/YuLan-Mini-Before-Annealing",
        "stable",
        25,
        4096,
        True,
        "yulanmini",
        55.67,
        29.94,
        34.06,
        "phase25's weights, from which the authors began the annealing",
    ),
    Checkpoint(
        "base-4k",
        None,
        "annealing",
        26,
        4096,
        False,
        "llama",
        64.72,
        66.65,
        61.60,
        "the authors' documents give no link to it; give a local folder instead",
    ),
    Checkpoint("base", "yulan-team/YuLan-Mini", "annealing", 27, 28723, False, "llama", 65.67, 68.46, 64.00),
    Checkpoint("instruct", "yulan-team/YuLan-Mini-Instruct", "post-trained", None, 28723, False, "llama"),
    Checkpoint(
        "nano",
        None,
        "untrained",
        None,
        1024,
        False,
        "yulanmini",
        note="a few million random weights in the published layout, made on this machine; for trying things out",
    ),
)

_PHASE_ALIAS = re.compile(r"phase([1-9]|1\d|2[0-5])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def list_aliases() -> list[str]:
    """Return the aliases of the table, in its order."""
    return [checkpoint.alias for checkpoint in CHECKPOINTS]


def find_alias(name: str) -> Checkpoint | None:
    """Return the base checkpoint of an alias, or None; every name from `phase1` to `phase25` is an alias.

    The authors published more phases than their table of scores lists, under the same pattern of names. An alias of a repository
    may have an `@revision`.
    """
    alias, revision = split_hub_id(name)
    entry = _find_row(alias)
    return None if entry is None or (revision and entry.repository is None) else entry


def find_published(name: str) -> Checkpoint | None:
    """Return the row of an alias or of a repository in the table, or None for any other name."""
    repository = split_hub_id(name)[0]
    return find_alias(name) or next((row for row in CHECKPOINTS if row.repository == repository), None)


def _find_row(name: str) -> Checkpoint | None:
    for checkpoint in CHECKPOINTS:
        if checkpoint.alias == name:
            return checkpoint
    match = _PHASE_ALIAS.fullmatch(name)
    if match is None:
        return None
    phase = int(match.group(1))
    return Checkpoint(name, f"yulan-team/YuLan-Mini-Phase{phase}", "stable", phase, 4096, False, "yulanmini")


def have_different_weights(one: str, other: str) -> bool:
    """Tell whether two names are aliases of checkpoints with different weights.

    Return False where one of them is a hub id or a folder: only the content of those can be compared.
    """
    first, second = find_alias(one), find_alias(other)
    return first is not None and second is not None and (first.stage, first.phase) != (second.stage, second.phase)


def is_hub_id(name: str) -> bool:
    """Tell whether `name` reads as `owner/repository`, with or without an `@revision`."""
    return _HUB_ID.fullmatch(split_hub_id(name)[0]) is not None


def split_hub_id(name: str) -> tuple[str, str | None]:
    """Return the repository and the revision of a name such as `owner/repository@revision`."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def describe_checkpoints() -> str:
    """Return the table as text, one line for each base checkpoint."""
    head = ("alias", "stage", "phase", "context", "states", "stored as", "LAMBADA", "GSM8K", "HumanEval", "repository")
    rows: list[tuple[str, ...]] = [head]
    for entry in CHECKPOINTS:
        scores = ("" if score is None else f"{score:.2f}" for score in (entry.lambada, entry.gsm8k, entry.humaneval))
        rows.append(
            (
                entry.alias,
                entry.stage,
                "" if entry.phase is None else str(entry.phase),
                f"{entry.context:,}",
                "yes" if entry.optimizer_states else "",
                entry.architecture,
                *scores,
                entry.repository or f"({entry.note})",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join([*lines, "", "phaseN works for every N from 1 to 25. A hub id or a local folder works too."])
