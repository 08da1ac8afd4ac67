"""Reach an OpenAI-compatible server through the client library. A key stands in no message."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

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


class Connection:
    """A client of one server; the library tries again where that can help, with growing pauses or as `Retry-After` says."""

    def __init__(
        self, base_url: str, where: str, *, key: str = "", timeout: float = 120.0, retries: int | None = None
    ) -> None:
        """Make the client; `where` begins its messages.

        Raises:
            EndpointError: the library is missing.
        """
        if importlib.util.find_spec("openai") is None:
            raise EndpointError(
                f"{where}: a server needs the package openai; install it: pip install 'yulan-finetune[synthesis]'"
            )
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

    def explain(self, error: Exception) -> Fault:
        """Say what a failed request means."""
        if isinstance(error, self._library.APIStatusError):
            status = int(error.status_code)
            kind = "server error" if status >= 500 or status == 429 else "refused"
            return Fault(kind, f"status {status}: {self._show(error.response.text)}", status in _FATAL)
        cause = error.__cause__ or error
        return Fault("no connection", f"{self.base_url}: {self._show(f'{type(cause).__name__}: {cause}')}")

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _show(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text[:_SHOWN].split())
