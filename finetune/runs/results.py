"""Read and write the result of a run: the trained weights' folder, its lineage, and a few rows as the model saw them.

The folder of a result (`adapter/` or `model/` of a run directory) holds `finetune.json`, its lineage, `rows.json`, a few
rows as token ids on which an export is compared, and `texts.json`, a few rows with their texts, on which its tokenizer is
compared. Reading them needs no torch.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.data.formats.rows import TextSample
from finetune.errors import FinetuneError
from finetune.files.folders import expand_home
from finetune.files.json_files import read_json, write_json
from finetune.files.safety.manifests import MANIFEST_FILE, find_damage
from finetune.recipe.methods import METHODS, Method
from finetune.recipe.sections import BEGINNINGS, AdapterInit, TrainedArchitecture
from finetune.runs.run_files import (
    ADAPTER_FOLDER,
    LINEAGE_FILE,
    MODEL_FOLDER,
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    SAMPLE_ROWS_FILE,
    TEXT_SAMPLES_FILE,
    find_result_folder,
    is_checkpoint_of_run,
    name_inner_run,
)
from finetune.runs.trainer_checkpoints import find_complete_checkpoint

ResultKind = Literal["adapter", "model"]


@dataclass(frozen=True)
class EarlierRun:
    """A run that a result continues: its base checkpoint with the hub's commit, its method, its folder."""

    checkpoint: str
    method: str
    run: str
    commit: str | None = None


@dataclass(frozen=True)
class Lineage:
    """Where a result comes from: its base checkpoint as the recipe names it, the folder of weights, the template.

    Where the folder `base` is gone, the base is found again by `checkpoint` and the hub's `commit`. `datasets` names those of the
    hub, with their commits. `earlier` holds the runs before this one, the oldest
    first. `max_positions` and `rope_theta` are set where training changed them; an adapter has no other place to record them.
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
    earlier: tuple[EarlierRun, ...] = ()
    max_positions: int | None = None
    rope_theta: float | None = None
    commit: str | None = None
    datasets: tuple[str, ...] = ()
    init: AdapterInit = "default"

    @property
    def holds_rounding(self) -> bool:
        """Whether the adapter holds a part of what quantization rounded off its base, so that it belongs to no other base."""
        return BEGINNINGS[self.init].holds_rounding

    def describe_chain(self) -> str:
        """Return the base checkpoint and every method that followed, such as `base → sft → dpo`."""
        runs = [*((run.checkpoint, run.method) for run in self.earlier), (self.checkpoint, self.method)]
        return " → ".join([runs[0][0], *(method for _, method in runs)])


@dataclass(frozen=True)
class SampleRow:
    """One row as the model saw it; `labels` are -100 for tokens that are not trained."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Result:
    """A trained adapter or model on disk; `lineage` is None for a folder that PEFT wrote elsewhere.

    `texts` is empty for such a folder, and for runs of before this kit stored them.
    """

    kind: ResultKind
    folder: Path
    lineage: Lineage | None
    rows: tuple[SampleRow, ...]
    texts: tuple[TextSample, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, which needs its base model."""
        return self.kind == "adapter"

    @property
    def method(self) -> Method | None:
        """The method that trained it, or None without a lineage."""
        return METHODS.get(self.lineage.method) if self.lineage is not None else None

    @property
    def is_reward_model(self) -> bool:
        """Whether it gives texts a score, and cannot generate."""
        return self.method is not None and self.method.trains_reward_model


def write_lineage(folder: Path, lineage: Lineage, rows: Sequence[SampleRow], texts: Sequence[TextSample] = ()) -> None:
    """Write `finetune.json`, `rows.json` and `texts.json` beside the weights of a result."""
    write_json(folder / LINEAGE_FILE, asdict(lineage))
    write_json(folder / SAMPLE_ROWS_FILE, [asdict(row) for row in rows])
    write_json(folder / TEXT_SAMPLES_FILE, [asdict(text) for text in texts])


def list_checked_files(folder: Path) -> list[Path]:
    """Return the files of a result that its manifest covers: weights and optimizer state, and how an adapter applies."""
    return sorted({*folder.rglob("*.safetensors"), *folder.rglob("*.pt"), *folder.glob(PEFT_CONFIG_FILE)})


def check_result_files(result: Result) -> None:
    """Compare the weights of a result with the hashes of when they were written; a result without any is taken as it is.

    Raises:
        FinetuneError: a file is missing or has changed.
    """
    if not os.path.lexists(result.folder / MANIFEST_FILE):
        return
    if (damage := find_damage(result.folder)) is not None:
        raise FinetuneError(
            f"{result.folder}: is not as it was written: {damage}; restore it or train again; if you changed it yourself, "
            f"remove {MANIFEST_FILE}"
        )


def is_result(path: Path) -> bool:
    """Tell whether a path is a run directory or the folder of a result, rather than a checkpoint."""
    marks = (ADAPTER_FOLDER, MODEL_FOLDER, RECORD_FILE, PEFT_CONFIG_FILE, LINEAGE_FILE)
    return any((path / name).exists() for name in marks) or is_checkpoint_of_run(path)


def find_earlier(checkpoint: str) -> Result | None:
    """Open the result that a recipe's `model.checkpoint` names; return None where it names a base checkpoint.

    Raises:
        FinetuneError: it is a run that has not finished.
    """
    path = expand_home(checkpoint)
    return open_result(path) if path.is_dir() and is_result(path) else None


def open_result(path: Path) -> Result:
    """Open a run directory, one of its checkpoints, the folder of a result, or an adapter folder that PEFT wrote.

    Raises:
        FinetuneError: there is no finished result and no complete checkpoint at that path.
    """
    if not path.is_dir():
        raise FinetuneError(f"{path}: there is no such folder; give a run directory or an adapter folder")
    if is_checkpoint_of_run(path):
        return _open_checkpoint(path)
    # What lies in a run directory itself is no result of this kit: an upload of TRL's puts an earlier adapter there.
    is_run = (path / RECORD_FILE).is_file()
    if not is_run and (path / PEFT_CONFIG_FILE).is_file():
        return _open_folder(path, "adapter")
    if not is_run and (path / LINEAGE_FILE).is_file():
        return _open_folder(path, "model")
    if (folder := find_result_folder(path)) is not None:
        return _open_folder(folder, "adapter" if folder.name == ADAPTER_FOLDER else "model")
    if is_run:
        checkpoint = find_complete_checkpoint(path)
        use = "" if checkpoint is None else f", or give its newest checkpoint instead, {checkpoint}"
        raise FinetuneError(
            f"{path}: this run has not finished; resume it with `finetune train {path / RECIPE_FILE} --resume`{use}"
        )
    inner = sorted(folder.parent.name for folder in path.glob(f"*/{PEFT_CONFIG_FILE}"))
    hint = f"; it holds adapters in folders of their own, give one of them: {', '.join(inner[:8])}" if inner else ""
    if (path / PEFT_WEIGHTS_FILE).is_file():
        hint = f"; it holds {PEFT_WEIGHTS_FILE}, and the {PEFT_CONFIG_FILE} that PEFT writes beside it is missing"
    if not hint and (inside := name_inner_run(path)):
        hint = f"; {inside}"
    raise FinetuneError(
        f"{path}: is neither a run directory nor an adapter folder (no adapter/, no model/, no adapter_config.json){hint}"
    )


def _open_checkpoint(path: Path) -> Result:
    """Open a checkpoint of a run, which the run has completed with its lineage and its rows."""
    if (damage := find_damage(path)) is not None:
        raise FinetuneError(f"{path}: this checkpoint is not whole ({damage}); use another")
    if (path / ADAPTER_FOLDER / LINEAGE_FILE).is_file():  # PiSSA's, as an adapter of the unchanged base
        return _open_folder(path / ADAPTER_FOLDER, "adapter")
    if not (path / LINEAGE_FILE).is_file():
        raise FinetuneError(
            f"{path}: lacks {LINEAGE_FILE}, which says how it was trained; the run was stopped while it wrote this checkpoint, or "
            f"an earlier version of this kit wrote it. Finish the run with `finetune train {path.parent / RECIPE_FILE} --resume`"
        )
    has_adapter = (path / PEFT_CONFIG_FILE).is_file()
    if not has_adapter and not (path / "config.json").is_file():
        raise FinetuneError(
            f"{path}: its weights are sharded over several processes; finish the run with `finetune train "
            f"{path.parent / RECIPE_FILE} --resume`, and use the run"
        )
    return _open_folder(path, "adapter" if has_adapter else "model")


def _open_folder(folder: Path, kind: ResultKind) -> Result:
    lineage = read_json(folder / LINEAGE_FILE)
    rows = read_json(folder / SAMPLE_ROWS_FILE) or []
    texts = read_json(folder / TEXT_SAMPLES_FILE) or []
    try:
        return Result(
            kind,
            folder,
            _read_lineage(lineage) if lineage is not None else None,
            tuple(SampleRow(**row) for row in rows),
            tuple(TextSample(**text) for text in texts),
        )
    except TypeError as error:
        raise FinetuneError(f"{folder / LINEAGE_FILE}: was written by another version of this kit ({error})") from error


def _read_lineage(content: dict[str, Any]) -> Lineage:
    earlier = tuple(EarlierRun(**run) for run in content.get("earlier", ()))
    if content.get("init", "default") not in BEGINNINGS:
        raise TypeError(f"init is {content['init']!r}")
    return Lineage(**{**content, "earlier": earlier, "datasets": tuple(content.get("datasets", ()))})
