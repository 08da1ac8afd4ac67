"""`finetune evaluate --tasks lm_eval:…`: the kit's model answers the requests of lm-evaluation-harness."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from reference import HALF_MEMORISED, REFERENCE, needs_reference, read_lines, read_reference

from finetune.cli.main import main
from finetune.errors import FinetuneError
from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.suite import suite_model
from finetune.evaluation.suite.suite_run import _read_result
from finetune.evaluation.tasks.task_results import SampleFile
from finetune.models.opening import open_model


def request(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture
def make_model(tmp_path, monkeypatch):
    """Return a function that gives the reference model as the harness calls it, over the answers kept in `tmp_path`."""
    loaded = open_model(HALF_MEMORISED)
    options = ModuleType("lm_eval.models.utils")
    # As that of lm_eval 0.4.13 for options such as these.
    options.normalize_gen_kwargs = lambda given: {"temperature": 0.0, "max_gen_toks": 256, "until": []} | given
    monkeypatch.setitem(sys.modules, "lm_eval.models.utils", options)

    def make():
        model = type("Model", (suite_model._Requests, object), {})()
        model.asked, model.answers = AskedModel(loaded), SampleFile(tmp_path / "answers.jsonl")
        return model

    return make


@needs_reference
def test_likelihoods_are_those_of_the_harness_and_are_kept(make_model, monkeypatch):
    rows = read_lines(REFERENCE / "data" / "lambada_like.jsonl")[:6]
    expected = read_reference("harness/half_memorised.json")["tasks"]["lambada"]["samples"]
    by_row = {sample["row"]: (sample["loglikelihood"], sample["greedy"]) for sample in expected}
    requests = [
        request(*(part if not number else f" {part}" for number, part in enumerate(row["text"].rsplit(" ", 1))))
        for row in rows
    ]
    model = make_model()
    first = model.loglikelihood(requests[:4])
    asked = []
    measure = AskedModel.measure
    monkeypatch.setattr(AskedModel, "measure", lambda self, pairs: (asked.append(len(pairs)), measure(self, pairs))[1])
    again = make_model().loglikelihood(requests)
    assert asked == [2]  # the four others were kept
    assert again[:4] == first
    for row, (value, greedy) in enumerate(again):
        assert value == pytest.approx(by_row[row][0], abs=1e-4)
        assert greedy == by_row[row][1]


@needs_reference
def test_texts_are_cut_and_equal_requests_are_told_apart(make_model):
    prompt = read_lines(REFERENCE / "data" / "lambada_like.jsonl")[0]["text"][:60]
    options = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    model = make_model()
    plain, same, short = model.generate_until(
        [request(prompt, options), request(prompt, options), request(prompt, options | {"max_gen_toks": 2})]
    )
    assert plain == same and plain.startswith(short) and "." not in plain
    assert len(model.answers.samples) == 3
    drawn = [request(prompt, {"temperature": 1.5, "do_sample": True, "max_gen_toks": 8})] * 4
    texts = make_model().generate_until(drawn)
    assert len(set(texts)) > 1
    with pytest.raises(FinetuneError, match="asks for the option num_beams of generation"):
        model.generate_until([request(prompt, options | {"num_beams": 4})])


@needs_reference
def test_a_conversation_is_rendered_in_the_models_template(make_model):
    turns = [{"role": "user", "content": "2 + 2?"}]
    text = make_model().apply_chat_template(turns)
    begun = make_model().apply_chat_template(
        [*turns, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    assert begun == f"{text}It is"


def test_figures_and_groups_are_read():
    found = {
        "results": {
            "one": {
                "alias": "one",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "exact_match,first": 1,
                "exact_match_stderr,first": "N/A",
            },
            "all": {"acc,none": 0.25},
        },
        "n-samples": {"one": {"original": 9, "effective": 4}, "two": {"original": 9, "effective": 3}},
        "group_subtasks": {"all": ["part", "two"], "part": ["one"]},
    }
    one = _read_result("one", found, "harness", REFERENCE / "nosuch")
    assert (one.task, one.n, one.file) == ("lm_eval:one", 4, "")
    assert one.metric == {"acc": 0.5, "exact_match,first": 1.0}
    assert one.stderr == {"acc": 0.1, "exact_match,first": None}
    assert _read_result("all", found, "harness", REFERENCE / "nosuch").n == 7


def test_without_the_package_the_message_names_the_extra(capsys, tmp_path, monkeypatch):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "nano", "--tasks", "lm_eval:hellaswag"])
    assert ended.value.code == 2
    assert (
        "lm_eval:hellaswag needs lm-evaluation-harness; install it: pip install 'yulan-finetune[evaluate]'"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
