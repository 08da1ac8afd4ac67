"""Ask until an answer can be read, since models do not always write the form that they are asked for."""

from collections.abc import Callable
from typing import TypeVar

from finetune.synthesis.endpoints.endpoint import Endpoint
from finetune.synthesis.endpoints.questioning import Request, Skip, Written

Value = TypeVar("Value")


def ask_until_read(
    endpoint: Endpoint,
    count: int,
    make: Callable[[int, int], Request],
    read: Callable[[int, str], Value | None],
    attempts: int,
) -> list[Value | Skip]:
    """Return what was read from the answer to each of `count` questions, or why there is none.

    `make` takes the number of the question and of the attempt, `read` the number of the question and the answer.

    Raises:
        EndpointError: the endpoint cannot be asked, or a limit is reached.
    """
    found: dict[int, Value | Skip] = {}
    open_numbers = list(range(count))
    for attempt in range(attempts):
        unread = []
        for number, outcome in zip(open_numbers, endpoint.ask_all(make(n, attempt) for n in open_numbers), strict=True):
            if not isinstance(outcome, Written):
                found[number] = outcome
                continue
            value = read(number, outcome.text)
            found[number] = Skip("unreadable answer", outcome.text[:80]) if value is None else value
            if value is None:
                unread.append(number)
        open_numbers = unread
    return [found[number] for number in range(count)]
