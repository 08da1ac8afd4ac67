"""What a run leaves behind about itself, and how later stages find it again.

The folder of a result (`adapter/` or `model/` of a run directory) carries `finetune.json` (the base it belongs to, by path
and by content; its template) and `rows.json` (a few real rows as token ids, on which an export is compared).
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.data.dataset import Splits
from finetune.data.template import ChatTemplate
from finetune.errors import CheckpointError, ExportError, FinetuneError, TemplateError
from finetune.recipe import TrainedArchitecture
from finetune.starts import find_base_folder, find_checkpoint, fingerprint_checkpoint

logger = logging.getLogger(__name__)

ORIGIN_FILE = "finetune.json"
ROWS_FILE = "rows.json"
# What an export is compared on. The real model needs minutes for so many on a processor.
_SAMPLE_ROWS, _SAMPLE_TOKENS, _LONGEST_SAMPLE = 64, 8192, 1024
ResultKind = Literal["adapter", "model"]


@dataclass(frozen=True)
class Origin:
    """Where a result comes from: the start as the recipe named it, the folder of weights it was trained on, its template."""

    checkpoint: str
    base: str
    base_fingerprint: str
    quantize: Literal["none", "int8", "nf4"]
    dtype: str
    template: str
    template_fingerprint: str
    method: str
    architecture: TrainedArchitecture = "llama"


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
    """Tell whether a path is a run directory or a folder of adapter weights, rather than a checkpoint."""
    return any((path / name).exists() for name in ("adapter", "model", "run.json", "adapter_config.json"))


def open_result(path: Path) -> Result:
    """Open a run directory, or an adapter folder of ours or of PEFT's.

    Raises:
        FinetuneError: there is no finished result at that path.
    """
    if not path.is_dir():
        raise FinetuneError(f"{path}: there is no such folder; give a run directory or an adapter folder")
    if (path / "adapter_config.json").is_file():
        return _open_folder(path, "adapter")
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
    origin = _read_json_file(folder / ORIGIN_FILE)
    rows = _read_json_file(folder / ROWS_FILE) or []
    try:
        return Result(
            kind,
            folder,
            Origin(**origin) if origin is not None else None,
            tuple(SampleRow(**row) for row in rows),
        )
    except TypeError as error:
        raise FinetuneError(f"{folder / ORIGIN_FILE}: was written by another version of this kit ({error})") from error


def find_complete_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, or None.

    A run can be killed while it writes one; the trainer's state is the last file of each.
    """
    steps = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; going on from an earlier one", checkpoint.name)
            continue
        return checkpoint
    return None


def find_base(result: Result) -> Path:
    """Return the folder that an adapter was trained on, after comparing its content.

    Raises:
        CheckpointError: the base cannot be found.
        ExportError: a base is there but holds other weights than the adapter was trained on.
    """
    origin = result.origin
    if origin is None:
        # As it is: an adapter whose base is a native folder was trained on the native model.
        return find_checkpoint(_read_peft_base(result.folder))
    base = Path(origin.base)
    if not base.is_dir():
        base = find_base_folder(origin.checkpoint, origin.architecture)
    found = fingerprint_checkpoint(base)
    if found != origin.base_fingerprint:
        raise ExportError(
            f"{result.folder}: this adapter was trained on other weights than {base} holds now "
            f"(content {origin.base_fingerprint[:12]}, found {found[:12]}); restore the checkpoint {origin.checkpoint!r} that it was trained on"
        )
    return base


def find_tokenizer_folder(result: Result, base: Path) -> Path:
    """Return where a result's tokenizer lies: its own folder, or its base for one that came without."""
    return result.folder if (result.folder / "tokenizer_config.json").is_file() else base


def check_template(result: Result, template: ChatTemplate) -> None:
    """Compare the template that was found with the one that a result was trained with.

    Raises:
        TemplateError: it is another one.
    """
    if result.origin is not None and template.fingerprint != result.origin.template_fingerprint:
        raise TemplateError(
            f"{result.folder}: its chat template is not the one that it was trained with ({result.origin.template}); "
            "restore chat_template.jinja, or train again"
        )


def _read_peft_base(folder: Path) -> str:
    name = (_read_json_file(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: does not say which base the adapter belongs to; set its base_model_name_or_path"
        )
    return str(name)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_json_file(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FinetuneError(f"{path}: is not valid JSON ({error}); the folder is damaged") from error


def choose_sample_rows(splits: Splits) -> list[SampleRow]:
    """Return held-out rows, or rows of the training where there are none."""
    rows = splits.train if splits.evaluation is None else splits.evaluation
    chosen: list[SampleRow] = []
    tokens = 0
    for row in rows.select(range(min(_SAMPLE_ROWS, len(rows)))):
        sample = SampleRow(row["input_ids"][:_LONGEST_SAMPLE], row["labels"][:_LONGEST_SAMPLE])
        tokens += len(sample.input_ids)
        if chosen and tokens > _SAMPLE_TOKENS:
            break
        chosen.append(sample)
    return chosen
