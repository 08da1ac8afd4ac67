"""Choose the files of a repository that a checkpoint needs: weights as safetensors and text files, neither code nor pickles."""

import fnmatch
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from finetune.errors import HubError
from finetune.hub.model_files import LICENCE_FILES, TEXT_FILES
from finetune.yulan.states.optimizer_states import POINTER
from finetune.yulan.tensors import INDEX_FILE, SINGLE_FILE

# Optimizer states are pickles. They are fetched only for a recipe that asks for them, and read as tensors and plain values.
_STATE_FILES = (POINTER, "*_universal/*.pt")
_ADAPTER_FILE = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def choose_text_files(names: Iterable[str], folder: Path) -> list[str]:
    """Return the configuration and the tokenizer files at the top of a repository.

    Raises:
        HubError: there is no configuration, so that it holds no model.
    """
    top = _list_top(names)
    if "config.json" not in top:
        raise HubError(_describe_no_model(top))
    return _match(top, TEXT_FILES)


def choose_checkpoint_files(names: Iterable[str], folder: Path) -> list[str]:
    """Return the text files and the weights: one file, or those that the index names, which is read once it is in `folder`.

    Other forms of the same weights (`original/`, `consolidated.safetensors`) are left out.

    Raises:
        HubError: it holds no weights as safetensors.
    """
    top = _list_top(names)
    chosen = [*choose_text_files(top, folder), *_match(top, LICENCE_FILES)]
    if INDEX_FILE in top:
        return [*chosen, INDEX_FILE, *(name for name in _read_shards(folder / INDEX_FILE) if name in top)]
    if SINGLE_FILE in top:
        return [*chosen, SINGLE_FILE]
    pickles = _match(top, _PICKLES)
    if pickles:
        raise HubError(
            f"it holds only pickled weights ({pickles[0]}), which can run code when they are opened; look for a version with "
            f"{SINGLE_FILE}, or convert them on the hub (https://huggingface.co/spaces/safetensors/convert)"
        )
    raise HubError(f"it holds no weights (neither {SINGLE_FILE} nor {INDEX_FILE})")


def choose_state_files(names: Iterable[str], folder: Path) -> list[str]:
    """Return the files of a checkpoint, and those of its optimizer state where it has one."""
    names = list(names)
    return [*choose_checkpoint_files(names, folder), *_match(names, _STATE_FILES)]


def advise_download(repository: str, revision: str | None) -> str:
    """Return the command that fetches the files of a checkpoint on another machine, and no others."""
    at = f" --revision {revision}" if revision else ""
    patterns = " ".join(f'--include "{pattern}"' for pattern in ("*.json", "model*.safetensors", "tokenizer.model"))
    return f'hf download {repository}{at} {patterns} --exclude "*/*" --local-dir {repository.rpartition("/")[2]}'


def _list_top(names: Iterable[str]) -> list[str]:
    return [name for name in names if "/" not in name and PurePosixPath(name).name == name]


def _match(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _describe_no_model(top: Sequence[str]) -> str:
    if not [name for name in top if not name.startswith(".git")]:
        return "the repository is empty; check the name"
    if _ADAPTER_FILE in top:
        return (
            f"it holds an adapter ({_ADAPTER_FILE}), not a model; fetch it with `hf download`, merge it with `finetune export "
            "FOLDER`, and give the export"
        )
    return f"it holds no config.json, so it is no model of transformers; found {', '.join(sorted(top)[:5])}"


def _read_shards(index: Path) -> list[str]:
    """Return the file names in an index that is here already; opening the weights checks it."""
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
