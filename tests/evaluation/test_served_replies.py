"""What a server may reply that is no answer, by a transport that stands for the network: each is one message and counts nothing."""

import json
from types import SimpleNamespace

import httpx2
import openai
import pytest

from finetune.errors import EndpointError
from finetune.evaluation.asking.engines import Engine, find_model
from finetune.evaluation.asking.generation import Generation, Prompt
from finetune.evaluation.asking.served_model import ServedModel
from finetune.servers.connection import Connection, read_key

URL = "http://server.test/v1"


@pytest.fixture
def connect(monkeypatch):
    """Return a function that gives a connection to a server which answers every request with the same bytes."""

    def make(content, status=200, kind="application/json"):
        transport = httpx2.MockTransport(
            lambda request: httpx2.Response(status, content=content, headers={"Content-Type": kind})
        )
        monkeypatch.setattr(openai, "DefaultHttpxClient", lambda **_: httpx2.Client(transport=transport))
        return Connection(URL, "--engine", retries=0)

    return make


def make_model(server):
    model = ServedModel(
        SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))),
        None,
        False,
        server,
        "served",
    )
    model.has_likelihoods, model.compared = True, {"likelihoods", "texts"}
    return model


def give_scores(score, top=-1.0):
    """Return a reply about the two tokens of a prompt and one that the server adds."""
    logprobs = {"token_logprobs": [None, score, -1.0], "top_logprobs": [None, {"best": top}, {"best": -1.0}]}
    return json.dumps({"choices": [{"text": "?", "logprobs": logprobs}]}).encode()


def test_a_likelihood_counts_as_it_is_sent(connect):
    (found,) = make_model(connect(give_scores(-2.5))).measure([([1], [2])])
    assert (found[1].loglikelihood, found[1].is_greedy) == (-2.5, False)
    (found,) = make_model(connect(give_scores(1e-7, 1e-7))).measure([([1], [2])])
    assert (found[1].loglikelihood, found[1].is_greedy) == (1e-7, True)


@pytest.mark.parametrize("score", ["NaN", "-Infinity", "Infinity", "0.5"])
def test_a_likelihood_that_is_none_stops_the_evaluation(connect, score):
    # NaN was counted as a wrong answer, with a perplexity of NaN.
    with pytest.raises(EndpointError, match=r"as the log-likelihood of a token, .*; the samples so far are kept"):
        list(make_model(connect(give_scores(float(score)))).measure([([1], [2])]))


SHAPES = {
    "html": b"<html>busy</html>",
    "cut": b'{"choices": [',
    "bytes": b"\xff\xfe",
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "error": b'{"error": {"message": "busy"}}',
    "no choices": b'{"choices": []}',
    "null choices": b'{"choices": null}',
    "null text": b'{"choices": [{"text": null}]}',
    "no text": b'{"choices": [{}]}',
    "number": b'{"choices": [{"text": 5, "logprobs": 5}]}',
    "texts": b'{"choices": [{"logprobs": {"token_logprobs": [null, "a"], "top_logprobs": [null, {"a": "b"}]}}]}',
}


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_reply_of_another_shape_is_one_message(connect, name, kind):
    # A text of null was the answer "None", and the others ended with a traceback.
    model = make_model(connect(SHAPES[name], kind=kind))
    message = (
        "--engine: the server's reply has another shape than OpenAI's completions: .*; the samples so far are kept"
    )
    with pytest.raises(EndpointError, match=message):
        list(model.measure([([1], [2])]))
    with pytest.raises(EndpointError, match=message):
        list(model.generate([Prompt([1, 2])], Generation(4)))


LISTS = {
    "html": (b"<html></html>", 200),
    "cut": (b'{"data": [', 200),
    "bytes": (b"\xff", 200),
    "nothing": (b"", 204),
    "list": (b'["x"]', 200),
    "null": (b'{"data": null}', 200),
    "names": (b'{"data": ["x"]}', 200),
    "no id": (b'{"data": [{}]}', 200),
    "number": (b'{"data": [{"id": 5}]}', 200),
}


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_list_of_models_is_one_message(connect, name, kind):
    with pytest.raises(EndpointError, match=r"server.test/v1/models gives no list of models .* usually ends with /v1"):
        find_model(Engine("server", URL), connect(*LISTS[name], kind))


@pytest.mark.parametrize("model", ["", "x"])
def test_a_server_without_models_has_none_to_name(connect, model):
    with pytest.raises(EndpointError, match="the server has no model; load one there, or name another server"):
        find_model(Engine("server", URL, model), connect(b'{"data": []}'))


@pytest.mark.parametrize("url", ["http://[::1", "http://exämple..com/v1", "http:", "http://", "http://a:99999/v1", "http://a:x/v1", "http://a b/v1"])  # fmt: skip
def test_an_address_of_no_server_is_one_message(url):
    with pytest.raises(EndpointError, match=r"^--engine: '.*' is no address of a server"):
        Connection(url, "--engine")


@pytest.mark.parametrize("key", ["secret\n", "sécret", "sec\nret", " secret"])
def test_a_key_that_no_header_holds_is_named_by_its_variable(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(EndpointError, match="the environment variable SOME_KEY") as raised:
        read_key("SOME_KEY", "--engine")
    assert "cret" not in str(raised.value)
