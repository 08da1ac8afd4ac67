"""Fetch the files of a repository that are needed, and no others, into the hub's own cache.

The files of a commit never change. What is here whole is used without a request, and after a first listing a name stands for one
commit. The download runs in the main thread, so that Ctrl-C ends it at once.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants

from finetune.errors import HubError, describe_count
from finetune.files.cache import find_cache
from finetune.files.json_files import read_json, write_json
from finetune.files.sizes import describe_size
from finetune.hub.cached_files import check_cached_files
from finetune.hub.commits import find_commit, remember_commit
from finetune.hub.faults import ANSWER_SECONDS, Asked, ask_hub

logger = logging.getLogger(__name__)

_LISTINGS = "hub"
_EXAMPLE_BITS = 100_000_000  # a usual connection, in bits a second
_SPARE_BYTES = 100_000_000

# Chooses files by the names in a listing, and by the folder with those that are here already.
Choice = Callable[[Iterable[str], Path], list[str]]


@dataclass(frozen=True)
class Listing:
    """The commit that a name stands for, and the size of each of its files, in bytes.

    `fault` says why the hub could not be asked, where only the files on this machine are listed.
    """

    commit: str
    sizes: Mapping[str, int]
    fault: str = ""


def fetch_files(asked: Asked, choose: Choice) -> Path:
    """Return the folder of a commit in the hub's cache, with at least the files that are chosen.

    `choose` is called until it names no file that is not here: the first files may say which others are needed.

    Raises:
        HubError: they are not here, and cannot be fetched.
    """
    listing = find_listing(asked)
    folder = _find_folder(asked, listing.commit)
    try:
        while absent := [name for name in choose(listing.sizes, folder) if not (folder / name).exists()]:
            _announce(asked, listing, absent)
            for name in absent:
                _fetch(asked, listing.commit, name)
        check_cached_files(folder / name for name in choose(listing.sizes, folder))
    except HubError:
        if listing.fault:  # it lacks a file here, which the hub may have
            raise HubError(listing.fault, is_unreachable=True) from None
        raise
    return folder


def find_listing(asked: Asked) -> Listing:
    """Return the commit and the files of a repository: as they were listed before where the commit is known, else by a request.

    Where the hub cannot be asked, the listing of an earlier day stands in, and a line says so.

    Raises:
        HubError: the hub cannot be asked, and nothing about it is here.
    """
    commit = find_commit(asked)
    if commit is not None and (known := _recall(asked, commit)) is not None:
        return known
    known = _recall(asked, commit or asked.revision) or _read_cached_folder(asked, commit)
    try:
        found = ask_hub(lambda: _request_listing(asked, commit), asked, tries_again=known is None)
    except HubError as error:
        if not error.is_unreachable or known is None:
            raise
        logger.warning("%s: %s. Using commit %s, which is on this machine", asked, error, known.commit[:12])
        found = replace(known, fault=str(error)) if known.fault else known
    else:
        _remember(asked, found)
    remember_commit(asked, found.commit)
    return found


def _request_listing(asked: Asked, commit: str | None) -> Listing:
    api = huggingface_hub.HfApi()
    request = api.dataset_info if asked.kind == "dataset" else api.model_info
    info = request(asked.repository, revision=commit or asked.revision, timeout=ANSWER_SECONDS, files_metadata=True)
    return Listing(str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()})


def _fetch(asked: Asked, commit: str, name: str) -> None:
    ask_hub(
        lambda: huggingface_hub.hf_hub_download(asked.repository, name, repo_type=asked.kind, revision=commit),
        asked,
    )


def _announce(asked: Asked, listing: Listing, names: list[str]) -> None:
    """Say how much will be fetched, before it is.

    Raises:
        HubError: the disk has no room for it.
    """
    size = sum(listing.sizes.get(name, 0) for name in names)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if size + _SPARE_BYTES > free and size > free:
        files = describe_count(len(names), f"file of {describe_size(size)} is", f"files of {describe_size(size)} are")
        raise HubError(
            f"{files} to be fetched, and the disk of {constants.HF_HUB_CACHE} has room for "
            f"{describe_size(free)}; make room there, or set HF_HOME to a folder on another disk"
        )
    minutes = size * 8 / _EXAMPLE_BITS / 60
    logger.info(
        "fetching %d files of %s, %s (%s at 100 Mbit/s), commit %s",
        len(names),
        asked,
        describe_size(size),
        f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute",
        listing.commit[:12],
    )


def _find_folder(asked: Asked, commit: str) -> Path:
    """Return the folder of a commit. Source of its name: huggingface_hub, "Understand caching"."""
    return Path(constants.HF_HUB_CACHE, _name_folder(asked), "snapshots", commit)


def _name_folder(asked: Asked) -> str:
    return f"{asked.kind}s--{asked.repository.replace('/', '--')}"


def _locate_listing(asked: Asked, revision: str | None) -> Path:
    return find_cache() / _LISTINGS / _name_folder(asked) / f"{quote(revision or 'main', safe='')}.json"


def _remember(asked: Asked, listing: Listing) -> None:
    with contextlib.suppress(OSError):  # without it the kit only asks the hub again
        for revision in (asked.revision, listing.commit):
            file = _locate_listing(asked, revision)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(listing))


def _recall(asked: Asked, revision: str | None) -> Listing | None:
    try:
        return Listing(**(read_json(_locate_listing(asked, revision)) or {}))
    except Exception:  # a damaged file of the cache is as good as none
        return None


def _read_cached_folder(asked: Asked, commit: str | None) -> Listing | None:
    """Return what another program has fetched, with the files that are here as the listing."""
    found = huggingface_hub.try_to_load_from_cache(
        asked.repository, "config.json", revision=commit or asked.revision, repo_type=asked.kind
    )
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    files = (path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Listing(folder.name, sizes, "some of its files are not on this machine")
