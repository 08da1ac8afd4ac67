"""Send a folder to a repository of the hub: private unless asked otherwise, in one commit, and never more than a model needs.

What the hub has already is not sent again, so a broken upload goes on where it stopped.
"""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, though not re-exported

from finetune.errors import HubError, describe_count
from finetune.files.folders import check_links
from finetune.files.sizes import describe_size
from finetune.hub.faults import Asked, ask_hub
from finetune.hub.model_files import LICENCE_FILES, TEXT_FILES

# Neither rows nor records with paths of this machine.
_SENT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "adapter_config.json",
    *TEXT_FILES,
    *LICENCE_FILES,
)
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class PushReport:
    """An upload: its address, the commit that it made, how many files with how many bytes, and who can read it."""

    address: str
    commit: str
    files: int
    bytes: int
    private: bool


def check_push(repository: str) -> None:
    """Check what can be checked before anything is made or sent.

    Raises:
        HubError: the name is none of a repository, or nobody is logged in.
    """
    owner, _, name = repository.partition("/")
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise HubError(f"{repository!r} cannot be the name of a repository ({error}); write OWNER/NAME") from error
    if not owner or not name:
        raise HubError(f"{repository!r} names no owner; write OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise HubError("nobody is logged in to the hub here; log in with `hf auth login`, with a token that may write")


def push_folder(folder: Path, repository: str, *, public: bool = False) -> PushReport:
    """Send the files of a model or an adapter to a repository, and make the repository where there is none.

    Raises:
        HubError: the hub refuses it, or the repository holds something else, or can be read by more people than was asked for.
        OutputError: a file is a link that leads out of the folder.
    """
    check_push(repository)
    check_links(folder)
    asked = Asked(repository)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, _SENT_FILES))
    if "README.md" not in names or not _list_weights(names):
        raise HubError(
            f"{folder}: holds no weights with a model card; give a run, or a folder that `finetune export` wrote"
        )
    api = huggingface_hub.HfApi()
    ask_hub(lambda: api.create_repo(repository, private=not public, exist_ok=True), asked)
    info = ask_hub(lambda: api.model_info(repository), asked)
    if not info.private and not public:
        raise HubError(
            f"{repository}: exists, and everybody can read it, so nothing was sent; add --public if that is meant, make it private at "
            f"{asked.page}/settings, or choose another name"
        )
    others = set(_list_weights([file.rfilename for file in info.siblings or ()])) - set(names)
    if others:
        raise HubError(
            f"{repository}: holds other weights ({', '.join(sorted(others)[:3])}), which programs would mix with these, so nothing was "
            "sent; remove them there, or choose another name"
        )
    done = ask_hub(lambda: _send(api, folder, repository, names), asked)
    size = sum((folder / name).stat().st_size for name in names)
    return PushReport(asked.page, str(done.oid), len(names), size, bool(info.private))


def describe_push(report: PushReport) -> str:
    """Return the report as text for a person."""
    readers = "only its owner can read it" if report.private else "everybody can read it"
    return f"{report.address}: {describe_count(report.files, 'file')}, {describe_size(report.bytes)}, commit {report.commit[:12]}; {readers}"


def _send(api: huggingface_hub.HfApi, folder: Path, repository: str, names: list[str]) -> "huggingface_hub.CommitInfo":
    return api.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="Upload with yulan-finetune"
    )


def _list_weights(names: list[str]) -> list[str]:
    return [name for name in names if _matches(name, _WEIGHTS)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
