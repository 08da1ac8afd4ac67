"""A quick share of `make faults`: a few places each."""

import contextlib
import random

import pytest
from injector import Server, can_inject
from kinds import make_kinds
from paid import ASKING, Asking, kill_and_finish
from scripted_server import ScriptedServer
from tries import fail_everywhere, kill_everywhere, kill_really

# Ten kills of each kind are made by `make faults`.
KILLS_OF_PAID_WORK = 4

pytestmark = pytest.mark.skipif(not can_inject(), reason="needs Linux and a C compiler")


@pytest.fixture(scope="module")
def server(tmp_path_factory, nano_llama):
    with Server(tmp_path_factory.mktemp("layer")) as started:
        yield started


@pytest.fixture
def kinds(tmp_path):
    return make_kinds(tmp_path)


def test_a_killed_run_is_resumed_to_the_same_weights(server, kinds):
    kind = kinds["lora"]()
    # The operations of a run number about 470; more than half of them are in its second half, where it saves.
    places = sorted(random.Random(1).sample(range(20, 460), 4))
    tally = kill_really(server, kind, iter(places))
    assert tally.stopped == tally.tries == 4
    assert not tally.faults, tally.examples


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_write_that_fails_is_one_message(server, kinds, error):
    tally = fail_everywhere(server, kinds["lora"](), error, iter(sorted(random.Random(2).sample(range(20, 460), 2))))
    assert not tally.faults, tally.examples
    assert tally.stopped


def test_a_fold_is_whole_or_absent_wherever_it_is_killed(server, kinds):
    tally = kill_everywhere(server, kinds["fold"](), tries=8)
    assert not tally.faults, tally.examples


@pytest.mark.parametrize("name", ASKING)
def test_what_a_killed_process_has_paid_for_is_not_asked_again(server, tmp_path, name):
    with contextlib.closing(ScriptedServer()) as answering:
        tally = kill_and_finish(server, Asking(name, tmp_path, answering), seed=21, tries=KILLS_OF_PAID_WORK)
    assert tally.stopped == tally.tries == KILLS_OF_PAID_WORK
    assert not tally.faults, tally.examples
