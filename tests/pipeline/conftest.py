"""What the tests of experiments of several runs share: a clock that says what the test needs."""

import math
from dataclasses import replace

import pytest

from finetune.training.speed.ways import WAYS


@pytest.fixture
def set_clock(monkeypatch):
    """Return a function that lets products in bfloat16, which this processor then has, count as faster or as slower from now on."""

    def set_it(*, is_faster):
        name = "bfloat16 products"
        way = replace(WAYS[name], faster=math.inf if is_faster else 0.0, find_missing=lambda device: None)
        monkeypatch.setitem(WAYS, name, way)

    return set_it
