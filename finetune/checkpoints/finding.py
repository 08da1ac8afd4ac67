"""Find the folder of a base checkpoint by its name, and of its Llama form.

A published checkpoint is downloaded, and `nano` is built. A native checkpoint is folded once; the cache finds the result again by
the checkpoint's content.
"""

import hashlib
import re
from pathlib import Path

from finetune.checkpoints.checkpoint_table import find_alias, is_hub_id, list_aliases, split_hub_id
from finetune.checkpoints.wanted_files import (
    advise_download,
    choose_checkpoint_files,
    choose_state_files,
    choose_text_files,
)
from finetune.errors import CheckpointError, HubError, describe_unknown_name
from finetune.files.cache import find_cache, hash_file, make_once
from finetune.files.folders import expand_home
from finetune.files.resources import find_demo_data
from finetune.hub.commits import find_commit
from finetune.hub.faults import Asked
from finetune.hub.snapshots import Choice, fetch_files
from finetune.recipe.sections import TrainedArchitecture
from finetune.yulan.folding import fold_checkpoint
from finetune.yulan.layout import find_architecture, read_config
from finetune.yulan.llama_files import check_llama
from finetune.yulan.nano import CONFIG, NANO_VERSION, build_nano
from finetune.yulan.states.optimizer_states import POINTER, RESULT
from finetune.yulan.tensors import list_weight_files

_FOLD_VERSION = 2
# The name of a run's checkpoint, which is none of the hub's.
_OF_A_RUN = re.compile(r"checkpoint-\d+")


def find_checkpoint(name: str) -> Path:
    """Return the local folder of a checkpoint; download it or build it first where needed.

    `name` is an alias or a hub id, both with an optional `@revision`, or a folder.

    Raises:
        CheckpointError: the name is unknown, or the checkpoint cannot be downloaded.
    """
    return _find(name, choose_checkpoint_files)


def find_text_files(name: str) -> Path:
    """Return the local folder with configuration and tokenizer of a checkpoint, as `find_checkpoint` finds it; without weights.

    Raises:
        CheckpointError: the name is unknown, or the files cannot be downloaded.
    """
    return _find(name, choose_text_files)


def find_states_folder(name: str) -> Path:
    """Return the local folder of a checkpoint with its optimizer state; download both where they are on the hub.

    Raises:
        CheckpointError: the checkpoint has no optimizer state, or it cannot be downloaded.
    """
    folder = _find(name, choose_state_files)
    if not any((place / POINTER).is_file() for place in (folder, folder / RESULT)):
        raise CheckpointError(
            f"{name}: holds no optimizer state (no {POINTER} in {folder}); set optimizer.states: fresh to begin with zero "
            "moments, give a folder that has one, or choose a checkpoint that has one (`finetune checkpoints` lists them)"
        )
    return folder


def _find(name: str, choose: Choice) -> Path:
    entry, folder = find_alias(name), expand_home(name)
    if entry is not None and entry.alias == "nano":
        return _find_nano()
    if entry is not None and entry.repository is None:
        raise CheckpointError(f"{name}: {entry.note}")
    if entry is None and folder.is_dir():
        return folder.resolve()
    if entry is None and _OF_A_RUN.fullmatch(folder.name) and folder.parent.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{name}: {folder.parent} has no {folder.name}; checkpoints in it: {there}")
    asked = find_repository(name)
    if asked is None:
        raise CheckpointError(
            f"{name!r} is {describe_unknown_name(name, list_aliases())}; a hub id (owner/repository) or a local folder works too"
        )
    try:
        return fetch_files(asked, choose)
    except HubError as error:
        elsewhere = (
            "\nOn a machine with a network run\n"
            f"  {advise_download(asked.repository, asked.revision)}\n"
            "and set model.checkpoint to that folder"
        )
        raise CheckpointError(f"{name}: {error}{elsewhere if error.is_unreachable else ''}") from error


def find_repository(name: str) -> Asked | None:
    """Return the repository of the hub and the revision that a name stands for, or None where it stands for no repository."""
    entry, (repository, revision) = find_alias(name), split_hub_id(name)
    if entry is not None:
        return None if entry.repository is None else Asked(entry.repository, revision)
    if expand_home(name).is_dir() or not is_hub_id(name) or name.startswith((".", "/", "~")):
        return None
    return Asked(repository, revision)


def find_named_commit(name: str) -> str | None:
    """Return the commit of the hub that a name stands for, as far as this process knows it."""
    asked = find_repository(name)
    return None if asked is None else find_commit(asked)


def pin_name(name: str, commit: str | None) -> str:
    """Return the name of a checkpoint at a commit of the hub; without one, or where it is on no hub, the name itself."""
    return name if commit is None or find_repository(name) is None else f"{split_hub_id(name)[0]}@{commit}"


def _find_nano() -> Path:
    files = [find_demo_data("demo.jsonl"), find_demo_data("demo_eval.jsonl")]
    key = hashlib.sha256(f"{NANO_VERSION}:{CONFIG}".encode())
    for file in files:
        key.update(file.read_bytes())
    return make_once(find_cache() / "nano" / key.hexdigest()[:16], lambda folder: build_nano(folder, files))


def as_llama(folder: Path) -> Path:
    """Return a folder with the Llama form of a checkpoint: the folder itself, or its fold in the cache.

    Raises:
        CheckpointError: the checkpoint cannot be read or folded.
        OutputError: the cache cannot be written.
    """
    if find_architecture(folder) == "llama":
        check_llama(folder)
        return folder
    return make_once(locate_fold(folder), lambda output: fold_checkpoint(folder, output))


def locate_fold(folder: Path) -> Path:
    """Return where the cache keeps the fold of a native checkpoint, whether it is there or not."""
    key = hashlib.sha256(f"{_FOLD_VERSION}:{fingerprint_checkpoint(folder)}".encode()).hexdigest()[:16]
    return find_cache() / "folds" / key


def find_base_folder(name: str, architecture: TrainedArchitecture) -> Path:
    """Return the folder whose weights a run loads: the checkpoint's Llama form, or the published native checkpoint.

    Raises:
        CheckpointError: it cannot be found or read, or it is no native checkpoint although `architecture` is native.
    """
    folder = find_checkpoint(name)
    if architecture == "llama":
        return as_llama(folder)
    if find_architecture(folder) == "llama":
        raise CheckpointError(
            f"{name}: is stored as Llama, so its native architecture cannot be trained; remove model.architecture, or choose "
            "one of the checkpoints that `finetune checkpoints` lists as yulanmini"
        )
    return folder


def fingerprint_checkpoint(folder: Path) -> str:
    """Return a hash of a checkpoint's configuration, tokenizer and weights.

    Raises:
        CheckpointError: the folder holds no complete checkpoint.
    """
    read_config(folder)
    digest = hashlib.sha256()
    for file in [folder / "config.json", folder / "tokenizer.json", *list_weight_files(folder)]:
        if file.is_file():
            digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()
