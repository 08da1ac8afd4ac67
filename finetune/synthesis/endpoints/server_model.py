"""Ask a model on an OpenAI-compatible server. The key comes from an environment variable and stands in no message."""

import json
import re
from typing import Any

from finetune.errors import EndpointError
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.servers.connection import Connection, read_key
from finetune.synthesis.endpoints.questioning import Outcome, Request, Skip, Written

_SHOWN = 200


class ServerModel:
    """A model on a server; the client library tries again where that can help, with growing pauses or as `Retry-After` says."""

    def __init__(self, section: EndpointSection, name: str) -> None:
        self._section, self._name = section, name
        self.identity = f"{section.base_url.rstrip('/')} {section.model}"
        self.concurrency = section.concurrency
        self._server = Connection(
            section.base_url,
            f"endpoints.{name}",
            key=_read_key(section, name),
            timeout=section.timeout_seconds,
            retries=section.retries,
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
        self._server.close()

    def _ask_once(self, request: Request) -> Outcome:
        messages: list[Any] = [{"role": role, "content": text} for role, text in request.turns]
        try:
            response = self._server.client.chat.completions.with_raw_response.create(
                model=self._section.model,
                messages=messages,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.number,
            )
            return read_reply(response.http_response.content)
        except self._server.failures as error:
            fault = self._server.explain(error)
            if fault.is_fatal:
                raise EndpointError(
                    f"endpoints.{self._name}: {self._section.base_url} answered with {fault.text}"
                ) from None
            return Skip(fault.kind, fault.text)


_SHAPE = "reply of another shape"
_HALF = re.compile(r"[\ud800-\udfff]")


def _read_key(section: EndpointSection, name: str) -> str:
    key = read_key(section.key_variable, f"endpoints.{name}.key_variable") if section.key_variable else ""
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
