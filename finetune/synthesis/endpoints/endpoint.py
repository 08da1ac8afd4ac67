"""Ask an endpoint many requests: each answer is kept at once, so that a stopped run goes on without asking it again."""

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Protocol

from finetune.errors import EndpointError, describe_count
from finetune.files.cache import find_cache
from finetune.files.safety.keyed_store import KeyedStore
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints.budget import Budget
from finetune.synthesis.endpoints.local_model import LocalModel
from finetune.synthesis.endpoints.questioning import Outcome, Request, Skip, Written
from finetune.synthesis.endpoints.server_model import ServerModel

# So many requests without an answer, one after the other, mean that the server is down and not that a row is odd.
_MOST_FAULTS = 10


class Model(Protocol):
    """What an endpoint asks: a server, or a model of this machine."""

    identity: str
    concurrency: int

    def ask(self, request: Request) -> Outcome:
        """Return an answer, or why this request has none."""

    def close(self) -> None:
        """Close connections, or free the memory."""


class Endpoint:
    """A named endpoint of a recipe with its limits and its kept answers."""

    def __init__(self, name: str, section: EndpointSection) -> None:
        self.name, self._section = name, section
        self._model: Model = ServerModel(section, name) if section.base_url else LocalModel(section)
        self._budget = Budget(section, name)
        self._store = KeyedStore(find_cache() / "answers.sqlite")
        self._faults, self._lock = 0, threading.Lock()
        self._pool = ThreadPoolExecutor(self._model.concurrency)

    @property
    def budget(self) -> Budget:
        """What was asked so far."""
        return self._budget

    @property
    def model_name(self) -> str:
        """The name of the model, for the provenance of rows."""
        return self._section.model

    def ask_all(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Yield the outcome of each request in their order; some are asked ahead, as many as the endpoint takes at once.

        Raises:
            EndpointError: the server is down or refuses the key, or a limit is reached; the answers so far are kept.
        """
        waiting: deque[Future[Outcome]] = deque()
        try:
            for request in requests:
                waiting.append(self._pool.submit(self._answer, request))
                if len(waiting) >= 2 * self._model.concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # What was cancelled is never done, and would be waited for without end.
            wait([future for future in waiting if not future.cancel()])

    def close(self) -> None:
        """Wait for the answers under way, which are kept, and close connections and the file of kept answers."""
        self._pool.shutdown(cancel_futures=True)
        self._model.close()
        self._store.close()

    def is_known(self, request: Request) -> bool:
        """Tell whether the answer to a request is kept already."""
        return self._store.get(request.make_key(self._model.identity)) is not None

    def _answer(self, request: Request) -> Outcome:
        """Return the outcome of a request. Its thread asks nothing else before the answer is on the disk."""
        key = request.make_key(self._model.identity)
        if (kept := self._store.get(key)) is not None:
            self._budget.count_cached()
            return Written(**json.loads(kept))
        self._budget.reserve(request)
        outcome: Outcome | None = None
        try:
            outcome = self._model.ask(request)
        finally:
            self._budget.settle(request, outcome if isinstance(outcome, Written) else None)
        if isinstance(outcome, Written):
            self._store.put(key, json.dumps(asdict(outcome)))
        self._count_faults(outcome)
        return outcome

    def _count_faults(self, outcome: Outcome) -> None:
        with self._lock:
            self._faults = self._faults + 1 if isinstance(outcome, Skip) and outcome.kind != "refused" else 0
            if isinstance(outcome, Skip) and self._faults >= _MOST_FAULTS:
                raise EndpointError(
                    f"endpoints.{self.name}: {describe_count(self._faults, 'request')} in a row got no answer, the last for this reason: {outcome.kind} "
                    f"({outcome.text}); see whether the server runs, and start again: all answers so far are kept"
                )


def open_endpoint(name: str, sections: Mapping[str, EndpointSection]) -> Endpoint:
    """Open the endpoint that a checked recipe names.

    Raises:
        EndpointError: its key is not set, or a package is missing.
    """
    return Endpoint(name, sections[name])
