"""List which commits of a repository have weights in the hub's cache, and remove one again."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import HFCacheInfo, constants
from huggingface_hub.errors import CacheNotFound

from finetune.files.safety.disk_errors import translate_os_errors
from finetune.hub.faults import Asked


def list_downloads(asked: Asked) -> set[str]:
    """Return the commits of a repository of which weights are in the cache."""
    cache = _scan(asked)
    return {
        revision.commit_hash
        for repository in (cache.repos if cache is not None else ())
        for revision in repository.revisions
        if any(file.file_name.endswith(".safetensors") for file in revision.files)
    }


def remove_download(asked: Asked, commit: str) -> int:
    """Remove a commit from the cache, with the blobs that no other commit needs; return the bytes that are free again.

    Raises:
        OutputError: a file cannot be removed.
    """
    cache = _scan(asked)
    if cache is None or commit not in list_downloads(asked):
        return 0
    strategy = cache.delete_revisions(commit)
    with translate_os_errors(Path(constants.HF_HUB_CACHE), "it is still there"):
        strategy.execute()
    return int(strategy.expected_freed_size)


def _scan(asked: Asked) -> HFCacheInfo | None:
    """Return what the cache holds of one repository: a copy of a repository has the same commits, and must stay."""
    try:
        cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None
    is_asked = (one for one in cache.repos if (one.repo_id, one.repo_type) == (asked.repository, asked.kind))
    return replace(cache, repos=frozenset(is_asked))
