"""List which commits of a repository have weights in the hub's cache, and remove one again."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import CacheNotFound

from finetune.files.safety.disk_errors import translate_os_errors
from finetune.hub.faults import Asked


def remove_download(asked: Asked, commit: str) -> int:
    """Remove a commit from the cache, with the blobs that no other commit needs; return the bytes that are free again.

    Raises:
        OutputError: a file cannot be removed.
    """
    if commit not in list_downloads(asked):
        return 0
    strategy = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(commit)
    with translate_os_errors(Path(constants.HF_HUB_CACHE), "it is still there"):
        strategy.execute()
    return int(strategy.expected_freed_size)


def list_downloads(asked: Asked) -> set[str]:
    """Return the commits of a repository of which weights are in the cache."""
    try:
        repositories = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return set()
    return {
        revision.commit_hash
        for repository in repositories
        if (repository.repo_id, repository.repo_type) == (asked.repository, asked.kind)
        for revision in repository.revisions
        if any(file.file_name.endswith(".safetensors") for file in revision.files)
    }
