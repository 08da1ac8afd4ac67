"""The search for cycles is put back as it was, and what passes through is left alone."""

import gc

import pytest

from finetune.files.speed import collect_between, pause_garbage_search


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_search_is_as_before_also_after_an_error(was_enabled):
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), pause_garbage_search():
            assert not gc.isenabled()
            1 / 0  # noqa: B018
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


def test_batches_pass_through():
    batches = [[1, 2], [], [3]]
    assert list(collect_between(iter(batches))) == batches
