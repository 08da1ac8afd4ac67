"""Ask a model on an OpenAI-compatible server. The key comes from an environment variable and stands in no message."""

import importlib
import importlib.util
import json
import os
import re
from typing import Any

from finetune.errors import EndpointError
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints.questioning import Outcome, Request, Skip, Written

_SHOWN = 200
# The user, or whoever runs the server, must change something; asking again does not help.
_FATAL = (401, 402, 403, 404)


class ServerModel:
    """A model on a server; the client library tries again where that can help, with growing pauses or as `Retry-After` says."""

    def __init__(self, section: EndpointSection, name: str) -> None:
        if importlib.util.find_spec("openai") is None:
            raise EndpointError(
                f"endpoints.{name}: a server needs the package openai; install it: pip install 'yulan-finetune[synthesis]'"
            )
        openai = importlib.import_module("openai")  # it takes a second, and is needed for servers only
        self._library, self._section, self._name = openai, section, name
        self._key = _read_key(section, name)
        self.identity = f"{section.base_url.rstrip('/')} {section.model}"
        self.concurrency = section.concurrency
        # A redirection could lead to a host that the recipe does not name. Identities of an OpenAI account are not for other servers.
        self._client = openai.OpenAI(
            base_url=section.base_url,
            api_key=self._key or "none",
            timeout=section.timeout_seconds,
            max_retries=section.retries,
            default_headers={"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()},
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def ask(self, request: Request) -> Outcome:
        """Send a request; a fault that concerns this request alone becomes a `Skip`.

        Raises:
            EndpointError: the server refuses every request: its key or its model is wrong.
        """
        outcome: Outcome = Skip("no answer", "")
        for _ in range(self._section.retries + 1):
            outcome = self._ask_once(request)
            if not isinstance(outcome, Skip) or outcome.kind != _SHAPE:
                break
        return outcome

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _ask_once(self, request: Request) -> Outcome:
        messages: list[Any] = [{"role": role, "content": text} for role, text in request.turns]
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._section.model,
                messages=messages,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.number,
            )
            return read_reply(response.http_response.content)
        except self._library.APIStatusError as error:
            text = f"status {error.status_code}: {self._show(error.response.text)}"
            if error.status_code in _FATAL:
                raise EndpointError(f"endpoints.{self._name}: {self._section.base_url} answered with {text}") from None
            kind = "server error" if error.status_code >= 500 or error.status_code == 429 else "refused"
            return Skip(kind, text)
        except self._library.APIConnectionError as error:
            cause = error.__cause__ or error
            return Skip("no connection", f"{self._section.base_url}: {self._show(f'{type(cause).__name__}: {cause}')}")

    def _show(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text[:_SHOWN].split())


_SHAPE = "reply of another shape"
_HALF = re.compile(r"[\ud800-\udfff]")


def _read_key(section: EndpointSection, name: str) -> str:
    key = os.environ.get(section.key_variable, "") if section.key_variable else ""
    if section.key_variable and not key:
        raise EndpointError(
            f"endpoints.{name}.key_variable: the environment variable {section.key_variable} is not set; set it to the server's key"
        )
    return key


def read_reply(content: bytes) -> Outcome:
    """Return the answer in the body of a reply, or a skip for one of another shape."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        usage = reply.get("usage")
        is_cut = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Skip(_SHAPE, " ".join(content[:_SHOWN].decode(errors="replace").split()))
    if not isinstance(text, str):
        return Skip(_SHAPE, "the answer is no text")
    if _HALF.search(text):
        return Skip(_SHAPE, "the answer holds half a character")
    return Written(text, _read_count(usage, "prompt_tokens"), _read_count(usage, "completion_tokens"), is_cut)


def _read_count(usage: object, key: str) -> int:
    """Return a number of tokens, or 0 where the server gives none; the answer counts all the same."""
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
