"""What a recipe says about its rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class DataSettings:
    """Files and what becomes of their rows; `held_out` is a share below 1 or a number of rows, `cache` a folder or None."""

    train: tuple[Path, ...]
    evaluation: tuple[Path, ...] = ()
    held_out: int | float = 0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    max_tokens: int = 2048
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    train_on: TrainOn = "assistant"
    substitute: Mapping[str, str] = field(default_factory=dict)
    deduplicate: bool = False
    cache: Path | None = None
