"""What a result says of itself: the base it belongs to, the runs before it, and real rows as the model saw them.

The folder of a result (`adapter/` or `model/` of a run directory) carries `finetune.json` (the base it belongs to, by path
and by content; its template; the runs that it went on from) and `rows.json` (a few real rows as token ids, on which an export
is compared). Reading them needs no torch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import FinetuneError
from finetune.recipe.sections import TrainedArchitecture
from finetune.recipe.methods import METHODS
from finetune.files.json_files import read_json, write_json

ORIGIN_FILE = "finetune.json"
ROWS_FILE = "rows.json"
ResultKind = Literal["adapter", "model"]


@dataclass(frozen=True)
class Stage:
    """An earlier run that a result went on from: what it started from, its method, its folder."""

    checkpoint: str
    method: str
    run: str


@dataclass(frozen=True)
class Origin:
    """Where a result comes from: the start as the recipe named it, the folder of weights it was trained on, its template.

    `checkpoint` is what the base is found by; `earlier` holds the runs before this one, the oldest first. An adapter's folder
    has no configuration of its own, so `max_positions` and `rope_theta` tell where it was trained with others than its base's.
    """

    checkpoint: str
    base: str
    base_fingerprint: str
    quantize: Literal["none", "int8", "nf4"]
    dtype: str
    template: str
    template_fingerprint: str
    method: str
    architecture: TrainedArchitecture = "llama"
    earlier: tuple[Stage, ...] = ()
    max_positions: int | None = None
    rope_theta: float | None = None

    def describe_chain(self) -> str:
        """Return the start and every method that followed, such as `base → sft → dpo`."""
        stages = [*((stage.checkpoint, stage.method) for stage in self.earlier), (self.checkpoint, self.method)]
        return " → ".join([stages[0][0], *(method for _, method in stages)])


@dataclass(frozen=True)
class SampleRow:
    """One row as the model saw it; `labels` hold -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Result:
    """A trained adapter or model on disk; `origin` is None for a folder that PEFT wrote elsewhere."""

    kind: ResultKind
    folder: Path
    origin: Origin | None
    rows: tuple[SampleRow, ...]


def write_origin(folder: Path, origin: Origin, rows: list[SampleRow]) -> None:
    """Write `finetune.json` and `rows.json` beside the weights of a result."""
    write_json(folder / ORIGIN_FILE, asdict(origin))
    write_json(folder / ROWS_FILE, [asdict(row) for row in rows])


def is_result(path: Path) -> bool:
    """Tell whether a path is a run directory or a folder of a result, rather than a checkpoint."""
    return any((path / name).exists() for name in ("adapter", "model", "run.json", "adapter_config.json", ORIGIN_FILE))


def find_earlier(checkpoint: str) -> Result | None:
    """Return the result that a recipe's `model.checkpoint` names, or None where it names a published or plain checkpoint.

    Raises:
        FinetuneError: it is a run that has not finished.
    """
    path = Path(checkpoint).expanduser()
    return open_result(path) if path.is_dir() and is_result(path) else None


def is_judge(result: Result) -> bool:
    """Tell whether a result is a reward model, which scores texts and cannot speak."""
    origin = result.origin
    return origin is not None and origin.method in METHODS and METHODS[origin.method].head == "score"


def open_result(path: Path) -> Result:
    """Open a run directory, or an adapter folder of ours or of PEFT's.

    Raises:
        FinetuneError: there is no finished result at that path.
    """
    if not path.is_dir():
        raise FinetuneError(f"{path}: there is no such folder; give a run directory or an adapter folder")
    if (path / "adapter_config.json").is_file():
        return _open_folder(path, "adapter")
    if (path / ORIGIN_FILE).is_file():
        return _open_folder(path, "model")
    for kind in ("adapter", "model"):
        if (path / kind).is_dir():
            return _open_folder(path / kind, kind)
    if (path / "run.json").is_file():
        raise FinetuneError(
            f"{path}: this run has not finished; go on with `finetune train {path / 'recipe.yaml'} --resume`"
        )
    raise FinetuneError(
        f"{path}: is neither a run directory nor an adapter folder (no adapter/, no model/, no adapter_config.json)"
    )


def _open_folder(folder: Path, kind: ResultKind) -> Result:
    origin = read_json(folder / ORIGIN_FILE)
    rows = read_json(folder / ROWS_FILE) or []
    try:
        return Result(
            kind,
            folder,
            _read_origin(origin) if origin is not None else None,
            tuple(SampleRow(**row) for row in rows),
        )
    except TypeError as error:
        raise FinetuneError(f"{folder / ORIGIN_FILE}: was written by another version of this kit ({error})") from error


def _read_origin(content: dict[str, Any]) -> Origin:
    return Origin(**{**content, "earlier": tuple(Stage(**stage) for stage in content.get("earlier", ()))})




