"""Reach an OpenAI-compatible server through the client library. A key stands in no message."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from finetune.errors import EndpointError

RETRIES = 5
_SHOWN = 200
# The user, or whoever runs the server, must change something; asking again does not help.
_FATAL = (401, 402, 403, 404)


@dataclass(frozen=True)
class Fault:
    """Why a request got no answer: what happened in short, and in words. `is_fatal`: every other request would fail as well."""

    kind: str
    text: str
    is_fatal: bool = False


class ReplyError(Exception):
    """A reply is no JSON; the message is its beginning."""


def read_key(variable: str, where: str) -> str:
    """Return the key that an environment variable holds, or an empty text where it is not set.

    Raises:
        EndpointError: it holds what no header of a request can hold.
    """
    key = os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise EndpointError(
            f"{where}: the key in the environment variable {variable} holds a character outside ASCII, a line break, or a space at an "
            "end; set the variable to the server's key alone"
        )
    return key


def _check_address(url: str, where: str) -> None:
    """Check that requests can be sent to an address.

    Raises:
        EndpointError: they cannot.
    """
    try:
        parts = urlsplit(url)
        httpx2.URL(url)
        is_whole = parts.hostname and parts.port != 0 and not any(map(str.isspace, url))
        fault = "" if is_whole else "it names no host, or the port 0, or holds a space"
    except (ValueError, httpx2.InvalidURL) as error:
        fault = str(error)
    if fault:
        raise EndpointError(
            f"{where}: {url!r} is no address of a server ({fault}); give one such as http://localhost:8000/v1"
        )


class Connection:
    """A client of one server; the library tries again where that can help, with growing pauses or as `Retry-After` says."""

    def __init__(
        self, base_url: str, where: str, *, key: str = "", timeout: float = 120.0, retries: int | None = None
    ) -> None:
        """Make the client; `where` begins its messages.

        Raises:
            EndpointError: the library is missing, or the address is none.
        """
        if importlib.util.find_spec("openai") is None:
            raise EndpointError(
                f"{where}: a server needs the package openai; install it: pip install 'yulan-finetune[synthesis]'"
            )
        _check_address(base_url, where)
        library = importlib.import_module("openai")  # it takes a second, and is needed for servers only
        self._library, self._key = library, key
        self.base_url = base_url
        # A redirection could lead to a host that nobody named. Identities of an OpenAI account are not for other servers.
        self.client: Any = library.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            timeout=timeout,
            max_retries=RETRIES if retries is None else retries,
            default_headers={"OpenAI-Organization": library.Omit(), "OpenAI-Project": library.Omit()},
            http_client=library.DefaultHttpxClient(follow_redirects=False),
        )

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """The errors of the library that `explain` explains."""
        return (self._library.APIStatusError, self._library.APIConnectionError)

    def read(self, ask: Callable[..., Any], **options: Any) -> Any:
        """Send a request by a method `with_raw_response` of the client, and return the JSON of the reply.

        Raises:
            ReplyError: the reply is no JSON.
        """
        # The client's own reading lets errors of the JSON pass, and takes a page of HTML for an answer.
        content = ask(**options).http_response.content
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise ReplyError(self.show(content[: 4 * _SHOWN].decode(errors="replace"))) from None

    def explain(self, error: Exception) -> Fault:
        """Say what a failed request means."""
        if isinstance(error, self._library.APIStatusError):
            status = int(error.status_code)
            kind = "server error" if status >= 500 or status == 429 else "refused"
            return Fault(kind, f"status {status}: {self.show(error.response.text)}", status in _FATAL)
        cause = error.__cause__ or error
        return Fault("no connection", f"{self.base_url}: {self.show(f'{type(cause).__name__}: {cause}')}")

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def show(self, text: str) -> str:
        """Return the beginning of a text on one line, without the key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text[:_SHOWN].split())
