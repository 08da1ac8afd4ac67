"""The folder of an experiment of several runs: whether it is free, and what a stopped call leaves in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import OutputError
from finetune.files.folders import check_writable
from finetune.runs.resuming import hold_folder


@contextmanager
def hold_experiment(output: Path, part: str, what: str) -> Iterator[None]:
    """Hold a folder that is free, or that holds an earlier call's results, which lie in its folder `part`; `what` names them.

    Folders that a stopped call has made and left empty are removed.

    Raises:
        OutputError: it holds something else, another process holds it, or it cannot be made.
    """
    if not (output / part).is_dir():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output}: exists and holds no {what}; choose another folder with -o")
        check_writable(output)
    with hold_folder(output), _leave_nothing_empty(output):
        yield


@contextmanager
def _leave_nothing_empty(output: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for folder in sorted((path for path in output.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
