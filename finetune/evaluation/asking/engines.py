"""The programs that may ask a model in the kit's place: a server that runs already, or vLLM, which is started for the evaluation."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from finetune.checkpoints.finding import as_llama, find_checkpoint
from finetune.errors import ArgumentError, EndpointError, MachineError, describe_unknown_name
from finetune.models.opening import LoadedModel
from finetune.runs.results import find_earlier
from finetune.servers.connection import Connection, ReplyError

VLLM, SERVER = "vllm", "server"
# The environment variable of a server's key, if it wants one.
KEY_VARIABLE = "OPENAI_API_KEY"
_OPTION = "--engine (engine=... in Python)"
_SERVED_NAME = "evaluated"
# Loading and warming up a model of 2.4 B weights takes a minute or two.
_MOST_SECONDS = 900.0
_PAUSE, _PATIENCE = 0.5, 30.0
_SHARE_OF_FREE_MEMORY = 0.85
_LAST_LINES = 300


@dataclass(frozen=True)
class Engine:
    """What asks the model; `url` and `model` are those of a server, where `model` may be empty if it has only one."""

    name: str
    url: str = ""
    model: str = ""

    def describe(self) -> str:
        """Return the engine as the option names it."""
        return " ".join(part for part in (self.name, self.url, self.model) if part)


def read_engine(words: Sequence[str]) -> Engine:
    """Read `vllm`, or `server URL` with an optional name of the model there.

    Raises:
        ArgumentError: it is neither.
    """
    name, *rest = words
    if name not in (VLLM, SERVER):
        raise ArgumentError(
            f"{_OPTION}: {name!r} is {describe_unknown_name(name, (VLLM, SERVER), 'an unknown engine')}"
        )
    if name == VLLM and not rest:
        return Engine(VLLM)
    if name == SERVER and len(rest) in (1, 2) and rest[0].startswith(("http://", "https://")):
        return Engine(SERVER, rest[0].rstrip("/"), *rest[1:])
    raise ArgumentError(
        f"{_OPTION}: must be vllm, or server with the address of an OpenAI-compatible server and, where it has several models, "
        f"the name of one, such as server http://localhost:8000/v1; found {' '.join(words)}"
    )


def find_model(engine: Engine, server: Connection) -> str:
    """Return the name of the model on a server.

    Raises:
        EndpointError: the server gives no answer, has no such model, or several where none is named.
    """
    where = f"{_OPTION} {engine.describe()}"
    try:
        names = _read_names(server.read(server.client.models.with_raw_response.list))
    except server.failures as error:
        raise EndpointError(f"{where}: the server gave no answer: {server.explain(error).text}") from None
    except (ReplyError, LookupError, TypeError):
        raise EndpointError(
            f"{where}: {server.base_url}/models gives no list of models as OpenAI's servers do; the address of such a server usually ends "
            "with /v1"
        ) from None
    if not names:
        raise EndpointError(f"{where}: the server has no model; load one there, or name another server")
    if engine.model and engine.model not in names:
        unknown = describe_unknown_name(engine.model, names, "a model that this server does not have")
        raise EndpointError(f"{where}: {engine.model!r} is {unknown}")
    if not engine.model and len(names) != 1:
        raise EndpointError(
            f"{where}: the server has {len(names)} models ({', '.join(names)}); name one behind the address"
        )
    return engine.model or names[0]


def _read_names(reply: Any) -> list[str]:
    """Return the names in a list of models; any other shape raises a LookupError or a TypeError."""
    names = [model["id"] for model in reply["data"]]
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError("a model's id is no text")
    return names


def choose_served_folder(model: str) -> Path:
    """Return the folder of Llama weights that vLLM loads for a model.

    Raises:
        FinetuneError: there is no such model, or it is an adapter.
    """
    earlier = find_earlier(model)
    if earlier is None:
        return as_llama(find_checkpoint(model))
    if earlier.is_adapter:
        raise EndpointError(
            f"{_OPTION} {VLLM}: {model} holds an adapter; export it first (finetune export {model} -o DIR), and evaluate DIR"
        )
    return earlier.folder


def find_vllm() -> list[str]:
    """Return the command that starts vLLM.

    Raises:
        MachineError: it is not installed.
    """
    if (program := shutil.which(VLLM)) is not None:
        return [program, "serve"]
    if importlib.util.find_spec(VLLM) is not None:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    raise MachineError(
        f"{_OPTION} {VLLM}: vLLM is not installed; install it in an environment of its own, since it needs a torch of its own, and put "
        f"its program vllm on the PATH, or start its server and name it: --engine server http://localhost:8000/v1"
    )


@contextlib.contextmanager
def serve_with_vllm(folder: Path, loaded: LoadedModel) -> Iterator[tuple[Connection, str]]:
    """Start vLLM on a folder, in the type of the model here, and stop it at the end; only this machine reaches it.

    Raises:
        MachineError: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    command = [*find_vllm(), str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--served-model-name", _SERVED_NAME]
    if loaded.model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.model.device)
        command += ["--gpu-memory-utilization", f"{_SHARE_OF_FREE_MEMORY * free / total:.2f}"]
    server = Connection(f"http://127.0.0.1:{port}/v1", f"{_OPTION} {VLLM}", retries=0)
    with tempfile.TemporaryFile() as log:
        variables = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
        try:
            _wait(process, server, log)
            yield server, _SERVED_NAME
        finally:
            server.close()
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a program and what it started, which is its own process group."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: "subprocess.Popen[bytes]", server: Connection, log: IO[bytes]) -> None:
    end = time.monotonic() + _MOST_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(*server.failures):
            server.client.models.with_raw_response.list()
            return
        time.sleep(_PAUSE)
    log.seek(0)
    last = " ".join(log.read().decode(errors="replace").split())[-_LAST_LINES:]
    raise MachineError(f"{_OPTION} {VLLM}: it did not start; it ended with: {last}")
