"""Endpoints: what is paid once is not paid twice, faults are skips or one message, and limits and keys hold."""

import contextlib
import json
import sqlite3
import time

import pytest
from scripted_server import reply

from finetune.errors import EndpointError
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints import endpoint as module
from finetune.synthesis.endpoints.endpoint import Endpoint
from finetune.synthesis.endpoints.questioning import Request, Skip, Written

SOON = {"Retry-After": "0.01"}
GOOD = (200, {}, reply("42"))
FAULTS = (
    (429, SOON, b"slow down"),
    (500, SOON, b"<html>"),
    (200, {"Content-Type": "text/html"}, b"<html>It works!</html>"),
    (200, {}, b'{"error": "another shape"}'),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (503, SOON, b"{"),
    (200, {"Content-Length": "1000"}, b'{"choices": [{"mess'),
    None,
)


@pytest.fixture
def make_endpoint(server, tmp_path, monkeypatch):
    """Return a function that opens an endpoint on the scripted server, with a cache of its own."""
    monkeypatch.setattr(module, "find_cache", lambda: tmp_path / "cache")

    def make(**options):
        section = EndpointSection(model="m", base_url=server.url, **{"retries": 2, "concurrency": 4, **options})
        made.append(Endpoint("teacher", section))
        return made[-1]

    made = []
    yield make
    for endpoint in made:
        endpoint.close()


def ask(count, **options):
    return [Request((("user", f"question {n}"),), 8, 0.0, **options) for n in range(count)]


def echo(times, body):
    return 200, {}, reply("echo " + body["messages"][-1]["content"])


def test_two_hundred_faults_lose_and_double_nothing(make_endpoint, server):
    """Every question meets two faults, of all kinds, before it is answered."""

    def script(times, body):
        number = int(body["messages"][-1]["content"].split()[1])
        return FAULTS[(number + times * 3) % len(FAULTS)] if times < 2 else echo(times, body)

    server.script = script
    outcomes = list(make_endpoint(retries=3, concurrency=16).ask_all(ask(100)))
    assert [outcome.text for outcome in outcomes] == [f"echo question {n}" for n in range(100)]
    assert len(server.bodies) == 300
    bodies = [body for body, times in server.answered.items() if "echo" not in body and times > 3]
    assert bodies == []


def test_answers_are_kept_and_come_again_without_a_request(make_endpoint, server):
    server.script = echo
    first = list(make_endpoint().ask_all(ask(5)))
    again = make_endpoint()
    assert list(again.ask_all(ask(7)))[:5] == first
    assert (len(server.bodies), again.budget.spent.cached, again.budget.spent.requests) == (7, 5, 2)
    other = list(make_endpoint().ask_all(ask(1, number=1)))
    assert len(server.bodies) == 8 and other == first[:1]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_request_is_sent_when_the_answers_before_it_are_on_the_disk(make_endpoint, server, tmp_path, concurrency):
    """A kill at this moment repeats no more than the answers of the other threads, and none where there is one thread."""
    unkept = []

    def script(times, body):
        came = len(server.bodies)  # with this one
        with contextlib.closing(sqlite3.connect(tmp_path / "cache" / "answers.sqlite")) as other:
            unkept.append(came - other.execute("SELECT count(*) FROM texts").fetchone()[0])
        return echo(times, body)

    server.script = script
    assert len(list(make_endpoint(concurrency=concurrency).ask_all(ask(40)))) == 40
    assert max(unkept) <= concurrency and len(server.bodies) == 40


def test_an_interruption_waits_for_the_answers_under_way_and_keeps_them(make_endpoint, server):
    """The file of answers was closed first when the reader of the answers was interrupted, so that those under way were lost."""

    def script(times, body):
        time.sleep(0 if "question 0" in str(body) else 0.2)
        return echo(times, body)

    server.script = script
    endpoint = make_endpoint()
    answers = endpoint.ask_all(ask(40))
    next(answers)  # the others are under way, or wait for a thread
    endpoint.close()
    asked = len(server.bodies)
    assert 1 < asked < 40
    again = make_endpoint()
    assert len(list(again.ask_all(ask(40)))) == 40
    assert (len(server.bodies), again.budget.spent.cached) == (40, asked)


def test_a_refused_request_is_a_named_skip_and_the_others_are_answered(make_endpoint, server):
    server.script = lambda times, body: (400, {}, b"too long") if "question 1" in str(body) else echo(times, body)
    found = list(make_endpoint().ask_all(ask(3)))
    assert found[1] == Skip("refused", "status 400: too long")
    assert [isinstance(outcome, Written) for outcome in found] == [True, False, True]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens": 1e400, "completion_tokens": NaN}',
        b'{"prompt_tokens": -3, "completion_tokens": "5"}',
        b"[1]",
        b"null",
    ],
)
def test_an_answer_without_numbers_of_tokens_counts_with_the_most_that_it_can_cost(make_endpoint, server, usage):
    """Endless numbers were a traceback, others lost an answer that was paid for, and no limit on tokens was ever reached."""
    server.script = lambda times, body: (
        200,
        {},
        b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "usage": ' + usage + b"}",
    )
    endpoint = make_endpoint(max_tokens_total=60, concurrency=1)
    with pytest.raises(
        EndpointError, match="max_tokens_total: the limit of 60 would be passed; so far 3 requests, 54 tokens"
    ):
        list(endpoint.ask_all(ask(5)))  # 10 characters and 8 tokens each
    assert len(server.bodies) == 3


def test_half_a_character_is_no_answer(make_endpoint, server):
    """The rows that were made of it could not be read by training."""
    server.script = lambda times, body: (200, {}, b'{"choices": [{"message": {"content": "x \\ud800 y"}}]}')
    assert list(make_endpoint(retries=0).ask_all(ask(1))) == [
        Skip("reply of another shape", "the answer holds half a character")
    ]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_one_message_without_the_key(make_endpoint, server, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server.script = lambda times, body: (status, {}, b"Incorrect key: sk-very-secret" + b" \x1b[31m" * 2000)
    with pytest.raises(EndpointError, match=rf"answered with status {status}: Incorrect key: \*\*\*") as error:
        list(make_endpoint(key_variable="MY_KEY").ask_all(ask(3)))
    assert "secret" not in str(error.value)
    assert len(str(error.value)) < 400  # of a long reply the beginning is shown
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"


def test_a_key_that_is_not_set_is_a_message(make_endpoint, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(EndpointError, match="the environment variable MY_KEY is not set"):
        make_endpoint(key_variable="MY_KEY")


def test_a_server_that_is_down_is_one_message(make_endpoint, server):
    server.script = lambda times, body: (500, SOON, b"down")
    with pytest.raises(
        EndpointError, match=r"1\d requests in a row got no answer, .* server error \(status 500: down\)"
    ):
        list(make_endpoint(retries=0).ask_all(ask(40)))


def test_limits_end_the_run_before_they_are_passed(make_endpoint, server):
    server.script = echo
    with pytest.raises(EndpointError, match="max_requests: the limit of 3 would be passed; so far 3 requests"):
        list(make_endpoint(max_requests=3, concurrency=1).ask_all(ask(5)))
    assert len(server.bodies) == 3
    more = make_endpoint(max_requests=2)
    assert len(list(more.ask_all(ask(5)))) == 5  # three are known
    cost = make_endpoint(max_cost=0.000040, prompt_price=1.0, answer_price=2.0, concurrency=1)
    with pytest.raises(EndpointError, match=r"max_cost: .* so far 1 request, 15 tokens, cost 2e-05"):
        list(cost.ask_all(ask(5, number=9)))
    assert cost.budget.spent.cost == pytest.approx((10 * 1.0 + 5 * 2.0) / 1e6)


def test_no_redirection_is_followed_and_no_account_is_sent(make_endpoint, server, monkeypatch):
    """A prompt would go to a host that the recipe does not name."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    server.script = lambda times, body: (307, {"Location": f"{server.url}/elsewhere"}, b"")
    (found,) = make_endpoint(retries=0).ask_all(ask(1))
    assert isinstance(found, Skip) and len(server.bodies) == 1
    assert "private" not in json.dumps(server.headers)


def test_sampling_of_a_local_model_repeats(tmp_path, monkeypatch, nano_llama):
    monkeypatch.setattr(module, "find_cache", lambda: tmp_path / "one")
    requests = [Request((("user", "Who are you?"),), 6, 1.0, number) for number in range(3)]
    section = EndpointSection(model="nano")
    with contextlib.closing(Endpoint("own", section)) as own:
        first = list(own.ask_all(requests))
    monkeypatch.setattr(module, "find_cache", lambda: tmp_path / "two")
    with contextlib.closing(Endpoint("own", section)) as own:
        assert list(own.ask_all(reversed(requests))) == first[::-1]
    assert len({written.text for written in first}) > 1
