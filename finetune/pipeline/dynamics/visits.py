"""The checkpoints that are compared: what each is called, where its results go, and what it left on the disk."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from finetune.checkpoints.checkpoint_table import find_alias
from finetune.checkpoints.finding import (
    find_checkpoint,
    find_named_commit,
    find_repository,
    find_text_files,
    locate_fold,
)
from finetune.data.encoding.tokenizer import load_tokenizer_file
from finetune.errors import FinetuneError, OutputError
from finetune.files.cache import find_cache
from finetune.files.folders import expand_home
from finetune.files.json_files import read_json, write_json
from finetune.files.safety.disk_errors import translate_os_errors
from finetune.growth.weights.weight_reading import open_weights
from finetune.hub.commits import pin_commits
from finetune.hub.faults import Asked
from finetune.hub.removal import list_downloads, remove_download
from finetune.models.opening import fingerprint_model
from finetune.runs.lineage import check_tokenizer, find_base, find_tokenizer_folder
from finetune.runs.results import find_earlier
from finetune.yulan.layout import find_architecture

logger = logging.getLogger(__name__)

_RECORD_FILE, _BROUGHT_FILE = "checkpoint.json", "brought.json"
KEPT = "what was measured before is kept; the same command continues"


@dataclass(frozen=True)
class Visit:
    """A checkpoint to measure: its name as given, its name in tables, the folder of its results, and its repository, if it has one."""

    name: str
    label: str
    folder: Path
    asked: Asked | None

    def read_record(self) -> dict[str, Any]:
        """Return the hash and the commit of the weights that were measured before, if any were."""
        record = read_json(self.folder / _RECORD_FILE)
        return record if isinstance(record, dict) else {}

    def identify(self) -> str:
        """Return the hash of the weights, and write it down; they are on this machine, or are fetched now.

        Raises:
            OutputError: others were measured before.
        """
        fingerprint = fingerprint_model(self.name)
        before = self.read_record().get("fingerprint")
        if before not in (None, fingerprint):
            raise OutputError(
                f"{self.folder}: holds the results of other weights than {self.name} has now; choose another folder with -o, or remove it"
            )
        with translate_os_errors(self.folder, KEPT):
            self.folder.mkdir(parents=True, exist_ok=True)
            record = {"name": self.name, "fingerprint": fingerprint, "commit": find_named_commit(self.name)}
            write_json(self.folder / _RECORD_FILE, record)
        return fingerprint


def plan_visits(names: Sequence[str], output: Path) -> list[Visit]:
    """Return a visit for each checkpoint, with labels that differ.

    Raises:
        FinetuneError: none is named, or one is named twice.
    """
    if not names:
        raise FinetuneError("dynamics: names no checkpoint; give some, such as phase5 phase10 base")
    identities = [_identify(name) for name in names]
    for number, identity in enumerate(identities):
        if identity in identities[:number]:
            raise FinetuneError(f"dynamics: {names[number]} is named twice; name each checkpoint once")
    labels = _choose_labels(names)
    folders = [output / "checkpoints" / _name_folder(*pair) for pair in zip(labels, identities, strict=True)]
    return [
        Visit(name, label, folder, find_repository(name) if find_earlier_folder(name) is None else None)
        for name, label, folder in zip(names, labels, folders, strict=True)
    ]


def list_other_checkpoints(visits: Sequence[Visit], output: Path) -> list[str]:
    """Return the names of the checkpoints that a folder holds results of, and that are not visited."""
    visited = {visit.folder for visit in visits}
    records = [
        read_json(file) for file in sorted(output.glob(f"checkpoints/*/{_RECORD_FILE}")) if file.parent not in visited
    ]
    return [str(record.get("name")) for record in records if isinstance(record, dict)]


def find_earlier_folder(name: str) -> Path | None:
    """Return the folder that a name stands for where it is a run or a folder, or None for an alias or a hub id."""
    path = expand_home(name)
    return path.resolve() if path.is_dir() and (find_alias(name) is None or find_earlier(name) is not None) else None


def _identify(name: str) -> str:
    return str(find_earlier_folder(name) or name)


def _choose_labels(names: Sequence[str]) -> list[str]:
    """Return for each path as many of its last parts as tell it from the others; other names stay."""
    folders = [find_earlier_folder(name) for name in names]
    labels = list(names)
    for number, folder in enumerate(folders):
        if folder is None:
            continue
        others = [other for place, other in enumerate(folders) if place != number and other is not None]
        count = 1
        while count < len(folder.parts) and any(other.parts[-count:] == folder.parts[-count:] for other in others):
            count += 1
        labels[number] = PurePath(*folder.parts[-count:]).as_posix()
    return labels


def _name_folder(label: str, identity: str) -> str:
    """Return a name that stays when other checkpoints are added."""
    plain = re.sub(r"[^\w.-]+", "-", identity.rpartition("/")[2] or label)[:60]
    return plain if plain == identity else f"{plain}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def check_visit(visit: Visit, *, needs_tokenizer: bool) -> None:
    """Look at a checkpoint before anything is measured: of one on the hub, at its small files only.

    Raises:
        FinetuneError: it cannot be found or used.
    """
    result = find_earlier(visit.name)
    if result is not None:
        if result.is_reward_model:
            raise FinetuneError(
                f"{visit.name}: is a reward model, which gives no text and no likelihood; name language models"
            )
        open_weights(visit.name)
        folder = find_tokenizer_folder(result, find_base(result) if result.is_adapter else result.folder)
    elif visit.asked is not None:
        with _pin(visit):
            folder = find_text_files(visit.name)
        find_architecture(folder)
    else:
        folder = find_checkpoint(visit.name)
        open_weights(visit.name)
    if needs_tokenizer:
        check_tokenizer(folder)
        load_tokenizer_file(folder, needs_padding=False)


@contextmanager
def bring(visit: Visit, *, keeps: bool) -> Iterator[None]:
    """Let the name stand for the same commit in every call and, unless it `keeps` them, write down what was on the disk before.

    After a kill the next call reads that, so that it removes what the killed one has fetched.
    """
    with _pin(visit):
        if not keeps and not (visit.folder / _BROUGHT_FILE).is_file():
            fold = _find_fold(visit)
            before = {
                "commits": [] if visit.asked is None else sorted(list_downloads(visit.asked)),
                "fold": fold is not None and fold.is_dir(),
            }
            with translate_os_errors(visit.folder, KEPT):
                visit.folder.mkdir(parents=True, exist_ok=True)
                write_json(visit.folder / _BROUGHT_FILE, before)
        yield


def remove_brought(visit: Visit) -> None:
    """Remove the download and the fold that were not there before, if they are still there.

    Raises:
        OutputError: a file cannot be removed.
    """
    before = read_json(visit.folder / _BROUGHT_FILE)
    if before is None:
        return
    with _pin(visit):
        fold = _find_fold(visit)
        if fold is not None and fold.is_dir() and not before["fold"]:
            with translate_os_errors(fold, "it is still there"):
                shutil.rmtree(fold)
            logger.info("%s: removed its fold", visit.label)
        commit = find_named_commit(visit.name)
        if visit.asked is not None and commit is not None and commit not in before["commits"]:
            freed = remove_download(visit.asked, commit)
            logger.info("%s: removed its download, %.1f GB", visit.label, freed / 1e9)
    with translate_os_errors(visit.folder, KEPT):
        (visit.folder / _BROUGHT_FILE).unlink()


def _find_fold(visit: Visit) -> Path | None:
    """Return where the fold of a native checkpoint lies in the cache, or None for other models and where no weights are here."""
    if find_earlier(visit.name) is not None:
        return None
    if visit.asked is not None and find_named_commit(visit.name) not in list_downloads(visit.asked):
        return None
    folder = find_checkpoint(visit.name)
    if find_architecture(folder) == "llama":
        return None
    fold = locate_fold(folder)
    return fold if fold.is_relative_to(find_cache()) else None


@contextmanager
def _pin(visit: Visit) -> Iterator[None]:
    """Let a name stand for the commit that was measured before, within the block."""
    commit = visit.read_record().get("commit")
    entries: list[Mapping[str, str | None]] = []
    if visit.asked is not None and isinstance(commit, str):
        asked = visit.asked
        entries = [{"kind": asked.kind, "repository": asked.repository, "revision": asked.revision, "commit": commit}]
    with pin_commits(entries):
        yield
