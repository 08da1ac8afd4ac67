"""`finetune evaluate --engine`: a server's answers count only where 20 of them are those of the model here."""

import json
from pathlib import Path

import pytest
from completions_server import CompletionsServer
from reference import HALF_MEMORISED, REFERENCE, needs_reference, read_lines, read_reference

from finetune.cli.main import main
from finetune.evaluation.asking import served_model
from finetune.models.opening import open_model

pytestmark = needs_reference
LAMBADA = ("--tasks", "lambada", "--task-data", REFERENCE / "data" / "lambada_like.jsonl")
WORDS = (*LAMBADA, "--protocol", "authors")


@pytest.fixture(scope="module")
def loaded():
    return open_model(HALF_MEMORISED)


@pytest.fixture
def server(loaded):
    made = CompletionsServer(loaded)
    yield made
    made.close()


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Return a function that evaluates the reference model in an empty folder; it gives exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "hidden")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", HALF_MEMORISED, *map(str, arguments), "-o", "out"])
        output = capsys.readouterr()
        assert "hidden" not in output.err
        return ended.value.code, output.out, output.err

    return run


def test_likelihoods_of_a_server_are_those_of_the_harness(call, server):
    status, out, err = call(*LAMBADA, "--limit", 24, "--engine", "server", server.url, "--json")
    assert status == 0, err
    reference = read_reference("harness/half_memorised.json")["tasks"]["lambada"]["samples"]
    for sample in read_lines(Path("out/lambada.jsonl")):
        expected = reference[sample["row"]]
        assert sample["loglikelihood"] == pytest.approx(expected["loglikelihood"], abs=1e-4)
        assert sample["greedy"] == expected["greedy"]
    assert len(server.bodies) == 1 + 20 + 24  # does it echo, what is compared, and the rows
    status, out, err = call(*LAMBADA, "--limit", 24)
    assert (status, out) == (2, "")
    assert "out: holds an evaluation with another engine (server; now None)" in err


def test_texts_of_a_server_are_judged_as_those_of_the_model_here(call, server):
    server.echoes = False
    status, out, err = call(*WORDS, "--limit", 8, "--engine", "server", server.url, "--json")
    assert status == 0, err
    assert json.loads(out)["tasks"]["lambada"]["bits_per_byte"] is None
    expected = read_reference("authors/half_memorised.json")["tasks"]["lambada"]["samples"]
    for sample in read_lines(Path("out/lambada.jsonl")):
        assert sample["generated"] == expected[sample["row"]]["generated"]


def test_two_equally_likely_tokens_may_be_taken_either_way(call, server, monkeypatch):
    server.spoil = lambda text: text[:-1] + "~"
    monkeypatch.setattr(served_model, "_TOLERANCE", {})
    monkeypatch.setattr(served_model, "_COARSE_TOLERANCE", 1e9)
    assert call(*WORDS, "--limit", 2, "--engine", "server", server.url)[0] == 0


MISTAKES = {
    "another model": ({"spoil": lambda text: f"No{text}"}, WORDS, (), "the server's model is another one, or computes otherwise: to one of the first prompts it writes 'No"),
    "other numbers": ({"shift": 0.5}, LAMBADA, (), "of one of the first prompts it gives a log-likelihood of"),
    "no likelihoods": ({"echoes": False}, LAMBADA, (), "--tasks: lambada: this server gives no log-likelihoods of a prompt"),
    "two models": ({"names": ["a", "b"]}, WORDS, (), "the server has 2 models (a, b); name one behind the address"),
    "no such model": ({}, WORDS, ("serve",), "'serve' is a model that this server does not have; did you mean 'served'?"),
    "key": ({"status": 401}, WORDS, (), "gave no answer: status 401: "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_server_that_cannot_be_used_is_one_message(call, server, mistake):
    fields, task, name, message = MISTAKES[mistake]
    for field, value in fields.items():
        setattr(server, field, value)
    status, out, err = call(*task, "--limit", 4, "--engine", "server", server.url, *name)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not list(Path().glob("out/*.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vlm"], "'vlm' is an unknown engine; did you mean 'vllm'?"),
        (["server"], "must be vllm, or server with the address of an OpenAI-compatible server"),
        (["server", "localhost:8000"], "found server localhost:8000"),
        (["server", "http://[::1"], "'http://[::1' is no address of a server"),
        (["server", "http://"], "is no address of a server"),
        (["vllm"], "vLLM is not installed; install it in an environment of its own"),
        (["server", "http://127.0.0.1:9/v1"], "the server gave no answer: http://127.0.0.1:9/v1: "),
    ],
)
def test_a_wrong_engine_is_one_message(call, words, message, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("finetune.servers.connection.RETRIES", 0)
    status, out, err = call(*WORDS, "--engine", *words)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not Path("out").exists()
