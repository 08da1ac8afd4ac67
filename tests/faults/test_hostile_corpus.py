"""A share of the hostile corpus: what once was a traceback or hung, and a few of every kind; `make faults` runs all."""

import pytest
from corpus import list_cases, run_case
from faults import make_sources
from injector import Server, can_inject
from kinds import make_kinds

pytestmark = pytest.mark.skipif(not can_inject(), reason="needs Linux and a C compiler")

# chat read the weights of an adapter without a manifest unchecked, export a manifest by an unguarded parser, --resume the states.
ONCE_WRONG = (
    ("adapter", "manifest.json: deep"),
    ("adapter", "adapter_model.safetensors: cut, no manifest"),
    ("adapter", "adapter_model.safetensors: a pipe, no manifest"),
    ("adapter", 'config {"target_modules": "(([a-z_.0-9]+)+)+!"}'),
    ("adapter", 'config {"modules_to_save": 5}'),
    ("checkpoint", "optimizer.pt: a pickle"),
    ("checkpoint", "scheduler.pt: empty"),
    ("checkpoint", "trainer_state.json: deep"),
    ("checkpoint", "named 'checkpoint-²'"),
    ("judge", "adapter/adapter_config.json: null"),
    ("run", "run.json: a list"),
    ("template", "a pipe"),
    ("recipe", "a device"),
    ("rows", "a pipe"),
)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    work = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(work / "cache"))
        with Server(work) as server:
            yield server, make_sources(server, make_kinds(work), work), work


def test_hostile_files_are_one_message(started):
    server, sources, work = started
    cases = {(case.kind, case.name): case for case in list_cases(sources)}
    assert len(cases) >= 500
    for name in ONCE_WRONG:
        assert run_case(server, cases[name], work / "hostile") == [], name
    for case in list(cases.values())[::140]:
        assert run_case(server, case, work / "hostile") == []
