"""What the tests of faster training share: a way that counts as faster, and as there."""

import math
from dataclasses import replace

import pytest

from finetune.training.speed.ways import WAYS


@pytest.fixture
def let_win(monkeypatch):
    """Return a function that lets a way count as faster, whatever the clock of a busy machine says."""

    def win(name):
        monkeypatch.setitem(WAYS, name, replace(WAYS[name], faster=math.inf))

    return win


@pytest.fixture
def install(monkeypatch, let_win):
    """Return a function that lets a way count as installed here, and as faster."""

    def there(name):
        let_win(name)
        monkeypatch.setitem(WAYS, name, replace(WAYS[name], find_missing=lambda device: None))

    return there
