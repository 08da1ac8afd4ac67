"""Find the data files of a path: a file, a folder or a glob; of a data set in splits, those of one split.

Hidden files, caches, notes and the other splits are left out, each with its reason, so that a person can be told.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from finetune.data.reading.file_kinds import KINDS, has_known_ending
from finetune.data.reading.patterns import expand_pattern, has_signs
from finetune.data.reading.raw_files import describe_missing
from finetune.data.settings import SplitName
from finetune.errors import DataError, Place, describe_count

# `Dataset.save_to_disk` writes these files beside the rows; they are part of the data set, so nobody need be told.
_PARTS_OF_DATASETS = ("state.json", "dataset_info.json", "dataset_dict.json")
_CACHES = ("cache-*.arrow", "indices*.arrow", "tmp*.arrow", "dataset_infos.json")
_NOTES = re.compile(
    r"(readme|licen[cs]e|notice|changelog|changes|citation|authors|contributing|requirements|copying|checksums|md5sums?|sha\d+sums?)"
    r"\b.*",
    re.IGNORECASE,
)
_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test"),
}
_MOST_NAMES = 6


@dataclass(frozen=True)
class DataFiles:
    """The data files of a path, sorted by name. `left_out` maps the other files, by their names within it, to the reason."""

    taken: list[Path]
    left_out: dict[str, str] = field(default_factory=dict)

    def describe(self, path: Path) -> tuple[str, ...]:
        """Return one sentence that names what is left out, or nothing."""
        if not self.left_out:
            return ()
        shown = [f"{name} ({reason})" for name, reason in self.left_out.items()][:_MOST_NAMES]
        more = len(self.left_out) - len(shown)
        return (
            f"not read in {path}: {', '.join(shown)}" + (f" and {describe_count(more, 'more file')}" if more else ""),
        )


def list_files(path: Path, split: SplitName = "train") -> list[Path]:
    """Return the data files of a path, as `choose_files` chooses them."""
    return choose_files(path, split).taken


def choose_files(path: Path, split: SplitName = "train") -> DataFiles:
    """Return the data files of a file, folder or glob; where they are splits, those for training or for evaluation.

    For training these are the files of `train`, and those of no split. For evaluation they are the files of `validation` or,
    without one, of `test`. A path that holds nothing else is taken whole.

    Raises:
        DataError: there is no data file.
    """
    if has_signs(path):
        root, found = expand_pattern(path)
        if not found:
            raise DataError("matches no file", Place(str(path)))
    elif path.is_dir():
        root, found = path, sorted(entry for entry in path.rglob("*") if entry.is_file())
    else:
        return DataFiles([path])
    left_out, data = {}, []
    for file in found:
        reason = _describe_other(file, root)
        if reason:
            left_out[file.relative_to(root).as_posix()] = reason
        elif reason is None:
            data.append(file)
    if not data:
        missing = (
            "holds no data files" if path.is_dir() else describe_missing(path) if not found else "matches no data file"
        )
        raise DataError(f"{missing}; known are {', '.join(KINDS)}", Place(str(path)))
    splits = {file: _find_split(file.relative_to(root)) for file in data}
    taken = _choose_split(splits, root, split)
    left_out |= {file.relative_to(root).as_posix(): _name_split(splits[file]) for file in data if file not in taken}
    return DataFiles(taken, left_out)


def _describe_other(file: Path, root: Path) -> str | None:
    """Return why a file is no data, "" where nobody need be told, or None for data."""
    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return "hidden"
    if file.name in _PARTS_OF_DATASETS:
        return ""
    if any(fnmatch(file.name, pattern) for pattern in _CACHES):
        return "a cache of datasets"
    if not has_known_ending(file) or (file.suffix.lower() == ".txt" and _NOTES.fullmatch(file.stem)):
        return "no data"
    if file.suffix == ".arrow" and file.name not in _list_saved(file):
        return "no part of the saved data set"
    return None


def _list_saved(file: Path) -> Sequence[str]:
    """Return the names of the Arrow files in the folder of a file, as its `state.json` lists them where there is one."""
    try:
        state = json.loads((file.parent / "state.json").read_text(encoding="utf-8"))
        return [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [file.name]


def _find_split(relative: Path) -> str | None:
    """Return the split that a file belongs to by the name of a folder above it, or by its own; None for no split."""
    stem = relative.name.split(".")[0]
    return next((found for part in (*relative.parts[:-1], stem) if (found := _read_split(part))), None)


def _read_split(name: str) -> str | None:
    """Return the split that a name begins or ends with, such as `train-00000-of-00002` or `gsm8k_test`."""
    words = [word.rstrip("0123456789") for word in re.split(r"[-_. ]+", name.lower())]
    words = [word for word in words if word and word != "of"]
    return (_WORDS.get(words[0]) or _WORDS.get(words[-1])) if words else None


def _choose_split(splits: Mapping[Path, str | None], root: Path, split: SplitName) -> list[Path]:
    names = set(splits.values())
    if split == "evaluation":
        wanted = next((name for name in ("validation", "test") if name in names), None)
        return (
            [file for file, name in splits.items() if name == wanted]
            if names & {"train", None} and wanted
            else [*splits]
        )
    if not names & {"train", None}:
        return [*splits]
    beside = set(_list_split_parents(splits, root))
    return [
        file
        for file, name in splits.items()
        if name == "train"
        or (name is None and not any(folder.parent in beside for folder in _list_folders(file, root)))
    ]


def _list_split_parents(splits: Mapping[Path, str | None], root: Path) -> Iterator[Path]:
    """Yield the folders that hold a folder of the split `train`: their other folders are other splits."""
    for file, name in splits.items():
        if name == "train":
            yield from (folder.parent for folder in _list_folders(file, root) if _read_split(folder.name) == "train")


def _list_folders(file: Path, root: Path) -> list[Path]:
    """Return the folders above a file that lie within `root`."""
    return [folder for folder in file.parents if root in folder.parents]


def _name_split(name: str | None) -> str:
    return "beside train" if name is None else f"split {name}"
