"""What every test starts from: a cache of its own, and the nano checkpoint in it."""

import logging
import os
from pathlib import Path

import pytest

from finetune.checkpoints.finding import as_llama, find_checkpoint

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep folds and hashes of the tests out of the user's own cache, also in child processes."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def keep_logging_as_it_was():
    """The command line sends our notes to the standard error of the test that calls it."""
    logger = logging.getLogger("finetune")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def nano(cache):
    """The nano checkpoint in the published layout."""
    return find_checkpoint("nano")


@pytest.fixture(scope="session")
def nano_llama(nano):
    """Nano folded into Llama weights."""
    return as_llama(nano)


@pytest.fixture(scope="session")
def shared():
    """The folder of reference and real data beside the checkout; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED
