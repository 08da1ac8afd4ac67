"""Find the folder of a base checkpoint by its name, and of its Llama form.

A published checkpoint is downloaded, and `nano` is built. A native checkpoint is folded once; the cache finds the result again by
the checkpoint's content.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune.checkpoints.checkpoint_table import find_alias, is_hub_id, list_aliases, split_hub_id
from finetune.errors import CheckpointError, describe_unknown_name
from finetune.files.cache import find_cache, hash_file, make_once
from finetune.files.folders import expand_home
from finetune.files.resources import find_demo_data
from finetune.recipe.sections import TrainedArchitecture
from finetune.yulan.folding import fold_checkpoint
from finetune.yulan.layout import find_architecture, read_config
from finetune.yulan.llama_files import check_llama
from finetune.yulan.nano import CONFIG, NANO_VERSION, build_nano
from finetune.yulan.states.optimizer_states import POINTER, RESULT
from finetune.yulan.tensors import list_weight_files

# Weights as safetensors, and text files; neither code nor pickles.
_WANTED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt")
# Optimizer states are pickles. They are downloaded only for a recipe that asks for them, and read as tensors and plain values.
_STATE_FILES = (POINTER, "*_universal/*.pt")
_FOLD_VERSION = 2


def find_checkpoint(name: str) -> Path:
    """Return the local folder of a checkpoint; download it or build it first where needed.

    `name` is an alias, a hub id with an optional `@revision`, or a folder.

    Raises:
        CheckpointError: the name is unknown, or the checkpoint cannot be downloaded.
    """
    entry = find_alias(name)
    if entry is not None:
        if entry.alias == "nano":
            return _find_nano()
        if entry.repository is None:
            raise CheckpointError(f"{name}: {entry.note}")
        return _download(entry.repository, None, name)
    folder = expand_home(name)
    if folder.is_dir():
        return folder.resolve()
    if is_hub_id(name) and not name.startswith((".", "/", "~")):
        return _download(*split_hub_id(name), name)
    raise CheckpointError(
        f"{name!r} is {describe_unknown_name(name, list_aliases())}; a hub id (owner/repository) or a local folder works too"
    )


def find_states_folder(name: str) -> Path:
    """Return the local folder of a checkpoint with its optimizer state; download both where they are on the hub.

    Raises:
        CheckpointError: the checkpoint has no optimizer state, or it cannot be downloaded.
    """
    folder = expand_home(name)
    entry = find_alias(name)
    if entry is not None and entry.repository is not None:
        folder = _download(entry.repository, None, name, (*_WANTED_FILES, *_STATE_FILES))
    elif entry is None and not folder.is_dir():
        folder = _download(*split_hub_id(name), name, (*_WANTED_FILES, *_STATE_FILES))
    if not any((place / POINTER).is_file() for place in (folder, folder / RESULT)):
        raise CheckpointError(
            f"{name}: holds no optimizer state (no {POINTER} in {folder}); set optimizer.states: fresh to begin with zero "
            "moments, give a folder that has one, or choose a checkpoint that has one (`finetune checkpoints` lists them)"
        )
    return folder


def _download(repository: str, revision: str | None, name: str, files: Sequence[str] = _WANTED_FILES) -> Path:
    try:
        # Access by attribute makes the library load its download code only here. It takes a fifth of a second.
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{name}: the hub has no {repository}{f' at {revision}' if revision else ''}, or it is private; check the name, "
            "or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: {repository} is not on this machine, and the hub cannot be reached; on a machine with a network run\n"
            f"  hf download {repository}{at} --local-dir {repository.rpartition('/')[2]}\n"
            "and set model.checkpoint to that folder"
        ) from error


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
    key = hashlib.sha256(f"{_FOLD_VERSION}:{fingerprint_checkpoint(folder)}".encode()).hexdigest()[:16]
    return make_once(find_cache() / "folds" / key, lambda output: fold_checkpoint(folder, output))


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
