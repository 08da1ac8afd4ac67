"""What is evaluated and how, and the model that is asked."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.evaluation.asking.asked_model import AskedModel
from finetune.evaluation.asking.engines import (
    KEY_VARIABLE,
    VLLM,
    Engine,
    choose_served_folder,
    find_model,
    find_vllm,
    serve_with_vllm,
)
from finetune.evaluation.asking.served_model import ServedModel
from finetune.evaluation.tasks.task_forms import Protocol
from finetune.files.folders import expand_home
from finetune.models.opening import LoadedModel, open_model
from finetune.servers.connection import Connection, read_key


@dataclass(frozen=True)
class TaskSettings:
    """What is evaluated and how; `limit` takes the first rows only, `batch_size` None what memory allows."""

    tasks: tuple[str, ...]
    protocol: Protocol = "harness"
    limit: int | None = None
    data: Path | None = None
    exemplars: Path | None = None
    batch_size: int | None = None
    chat: bool = False
    unsafe_code: bool = False
    engine: Engine | None = None

    def ask_with(self, loaded: LoadedModel, server: Connection | None = None, name: str = "") -> AskedModel:
        """Return a model that answers as these settings say, in memory or under its name on a server."""
        if server is None or self.engine is None:
            return AskedModel(loaded, self.batch_size, self.chat)
        return ServedModel(loaded, self.batch_size, self.chat, server, name, f"--engine {self.engine.describe()}")


@contextlib.contextmanager
def open_asked(model: str, settings: TaskSettings) -> Iterator[AskedModel]:
    """Open a model, and what asks it in its place, if the settings name an engine.

    Raises:
        FinetuneError: the model cannot be opened, or the engine cannot be used.
    """
    engine = settings.engine
    if engine is None:
        yield settings.ask_with(open_model(model))
    elif engine.name == VLLM:
        find_vllm()
        folder = choose_served_folder(model)
        loaded = open_model(model)
        with serve_with_vllm(folder, loaded) as (server, name):
            yield settings.ask_with(loaded, server, name)
    else:
        where = f"--engine {engine.describe()}"
        server = Connection(engine.url, where, key=read_key(KEY_VARIABLE, where))
        with contextlib.closing(server):
            name = find_model(engine, server)
            yield settings.ask_with(open_model(model), server, name)


def choose_folder(model: str, protocol: Protocol) -> Path:
    """Return where results go by default: `evaluations/`, under the last part of the model's name."""
    path = expand_home(model)
    name = path.resolve().name if path.exists() else model.replace("/", "--")
    return Path("evaluations") / f"{name}-{protocol}"
