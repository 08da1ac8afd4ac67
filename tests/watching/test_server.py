"""The server of the page: only this machine, only with the token, only reading, always the newest state."""

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from finetune.errors import FinetuneError, MachineError
from finetune.watching.server import BoardServer


@pytest.fixture
def serve():
    """Return a function that serves runs until the test ends, and gives the server."""
    servers = []

    def start(*runs, **options):
        server = BoardServer(runs, **options)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(address, method="GET", **headers):
    """Return the status and the text of the answer to one request."""
    place = urlsplit(address)
    with closing(http.client.HTTPConnection(place.hostname, place.port, timeout=10)) as connection:
        connection.request(method, place.path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def read(address):
    status, text = ask(address)
    assert status == 200
    return text


def test_the_page_is_live(serve, write_run):
    server = serve(write_run(steps=3))
    assert server.server_address[0] == "127.0.0.1"
    assert 'data-live="2.0"' in read(server.address)
    assert json.loads(read(f"{server.address}data"))["runs"][0]["step"] == 3
    write_run(steps=5)
    assert json.loads(read(f"{server.address}data"))["runs"][0]["step"] == 5


@pytest.mark.parametrize("path", ["/", "/data", "/{}/../../etc/passwd", "/{}x/", "/{}/run.json"])
def test_without_the_token_there_is_nothing(serve, write_run, path):
    server = serve(write_run())
    assert ask(f"http://127.0.0.1:{server.server_port}{path.format(server.token)}")[0] == 404


def test_another_host_name_is_refused(serve, write_run):
    """A page of the web could name this machine by a name of its own (DNS rebinding)."""
    assert ask(serve(write_run()).address, Host="example.org")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_written(serve, write_run, method):
    assert ask(serve(write_run()).address, method)[0] == 501


def test_a_run_that_vanishes_is_told(serve, write_run):
    run = write_run()
    server = serve(run)
    (run / "run.json").unlink()
    status, text = ask(f"{server.address}data")
    assert status == 503 and "is no run directory" in text


def test_of_several_runs_one_that_vanishes_is_named_and_a_new_one_appears(serve, write_run, tmp_path):
    first, second, third = write_run("one"), write_run("two"), tmp_path / "three"
    third.mkdir()
    server = serve(first, second, third)
    assert [fault.split(":")[0] for fault in server.left_out] == [str(third)]
    (second / "run.json").unlink()
    write_run("three")
    data = json.loads(read(f"{server.address}data"))
    assert [run["name"] for run in data["runs"]] == ["one", "three"]
    assert [fault.split(":")[0] for fault in data["left_out"]] == [str(second)]


def test_a_run_that_has_not_begun_appears_when_it_does(serve, write_run, tmp_path):
    server = serve(tmp_path / "run", waits=True)
    assert json.loads(read(f"{server.address}data"))["runs"] == []
    assert "A run that has not begun" in read(server.address)
    write_run()
    assert len(json.loads(read(f"{server.address}data"))["runs"]) == 1


def test_a_port_that_is_taken_and_a_folder_that_is_no_run_are_refused(serve, write_run, tmp_path):
    server = serve(write_run())
    with pytest.raises(MachineError, match=f"--port {server.server_port}"):
        BoardServer([tmp_path / "run"], server.server_port)
    with pytest.raises(MachineError, match="--port 70000"):
        BoardServer([tmp_path / "run"], 70_000)
    with pytest.raises(FinetuneError, match="is no run directory"):
        BoardServer([tmp_path])


def test_an_open_page_sees_how_the_run_ends(serve, write_run):
    """The page of `finetune train --watch` stayed at "saving": its server ended before it had asked again."""
    server = serve(write_run())
    server.let_page_catch_up()  # no page has asked, so nothing is waited for
    server = serve(write_run())
    read(server.address)
    waiting = threading.Thread(target=server.let_page_catch_up, args=(60,))
    waiting.start()
    while not server._ends:
        time.sleep(0.01)
    assert json.loads(read(f"{server.address}data"))["runs"][0]["status"] == "running"
    waiting.join(20)
    assert not waiting.is_alive()


def test_the_command_serves_until_its_input_ends(write_run):
    """So a training with --watch takes the page along when it ends or is killed."""
    command = [sys.executable, "-m", "finetune", "watch", str(write_run()), "--until-input-ends"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", process.stdout.readline())[0]
        assert "<main" in read(address)
        process.stdin.close()
        read(f"{address}data")
        process.wait(timeout=20)
    assert process.returncode == 0
