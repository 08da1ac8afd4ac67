"""Say what went wrong between this machine and the hub, and what to do: one row of a table for each kind of fault.

A fault that may pass by itself is tried again, with a longer wait each time.

Source of the errors: huggingface_hub 2.4 (`utils/_http.py`, `file_download.py`), httpx2 2.16 (`_exceptions.py`).
"""

import errno
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from finetune.errors import HubError
from finetune.files.safety.disk_errors import REASONS

logger = logging.getLogger(__name__)

# Seconds before the second and the third try.
_WAITS = (1, 3)
# After a try of so many seconds there is no other: the library has tried again by itself.
_PATIENCE = 60
ANSWER_SECONDS = 10
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PAGES = {"model": "", "dataset": "datasets/"}

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked:
    """A repository of the hub, and the branch, tag or commit that is meant; without one it is `main`."""

    repository: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    @property
    def page(self) -> str:
        """The address of the repository for a browser."""
        return f"{constants.ENDPOINT}/{_PAGES[self.kind]}{self.repository}"

    def __str__(self) -> str:
        """Return the name with its revision."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True)
class _Fault:
    """A kind of fault: how it is recognised, and its sentence with what to do.

    `passes`: it may pass by itself. `is_unreachable`: the hub said nothing, so that a copy on this machine can stand in.
    """

    matches: Callable[[BaseException], bool]
    text: str
    passes: bool = False
    is_unreachable: bool = False


def _is(*classes: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, classes)


def _has_status(*codes: int) -> Callable[[BaseException], bool]:
    return lambda error: _read_status(error) in codes


def _read_status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _has_number(*numbers: int) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, OSError) and error.errno in numbers


def _is_gated_for_account(error: BaseException) -> bool:
    return isinstance(error, GatedRepoError) and _read_status(error) == 403


def _is_server_fault(error: BaseException) -> bool:
    return (_read_status(error) or 0) >= 500


def _is_offline(error: BaseException) -> bool:
    # datasets 5.2 raises a ConnectionError in place of the hub library's error, and keeps only the name of that.
    return isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, ConnectionError) and OfflineModeIsEnabled.__name__ in str(error)
    )


def _is_cut(error: BaseException) -> bool:
    # The library compares the size of what arrived, and raises an OSError without a number.
    return type(error) is OSError and error.errno is None


# The first row that matches counts.
_FAULTS = (
    _Fault(
        _is_offline,
        "the network is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; unset it, or fetch the files on another machine",
        is_unreachable=True,
    ),
    _Fault(
        _is_gated_for_account,
        "your account may not read {asked}: its owners ask for an agreement, and may have to let you in; open {page}, accept it, and "
        "wait for their answer",
    ),
    _Fault(
        _is(GatedRepoError),
        "{asked} can be read only by those who accepted its licence; open {page}, accept it, and log in with `hf auth login`",
    ),
    _Fault(
        _is(RevisionNotFoundError),
        "{repository} has no branch, tag or commit {revision!r}; see {page}/commits/main, or leave the part from @ out",
    ),
    _Fault(_is(DisabledRepoError), "the hub has disabled {repository}; see {page}"),
    _Fault(
        _is(RepositoryNotFoundError),
        "the hub has no {repository}, or it is private; check the name, or log in with `hf auth login`",
    ),
    _Fault(
        _has_status(401),
        "the hub does not accept your token, which is wrong, was revoked, or has expired; log in anew with `hf auth login`, or unset "
        "HF_TOKEN",
    ),
    _Fault(
        _has_status(403),
        "your token may not do this with {repository}; make one that may at {endpoint}/settings/tokens, and log in with it by "
        "`hf auth login`",
    ),
    _Fault(_has_status(404), "{repository} lacks a file that it lists, or the hub has moved it; see {page}"),
    _Fault(
        _has_status(429),
        "the hub refuses more requests from here for now; wait some minutes, or log in with `hf auth login`, which raises the limit",
        passes=True,
        is_unreachable=True,
    ),
    _Fault(
        _has_status(409, 412), "{repository} was changed by somebody else at the same time; run the same command again"
    ),
    _Fault(
        _is_server_fault,
        "the hub has a fault of its own (status {status}); try again later, and look at https://status.huggingface.co",
        passes=True,
        is_unreachable=True,
    ),
    _Fault(_has_status(408), "the hub waited too long for this machine; check the connection", passes=True),
    _Fault(_is(HfHubHTTPError), "the hub refuses the request (status {status}: {detail}); see {page}"),
    _Fault(
        _is(httpx2.ProxyError),
        "the proxy refuses the connection ({detail}); check HTTPS_PROXY and HTTP_PROXY",
        is_unreachable=True,
    ),
    _Fault(
        _is(httpx2.ConnectError),
        "{endpoint} cannot be reached ({detail}); check the connection, HTTPS_PROXY, and HF_ENDPOINT if you set it",
        passes=True,
        is_unreachable=True,
    ),
    _Fault(
        _is(httpx2.TimeoutException),
        "{endpoint} does not answer; check the connection, or allow more seconds with HF_HUB_DOWNLOAD_TIMEOUT",
        passes=True,
        is_unreachable=True,
    ),
    _Fault(
        _is(httpx2.TransportError),
        "the connection to {endpoint} broke off ({detail}); run the same command again, which keeps the files that are whole",
        passes=True,
        is_unreachable=True,
    ),
    _Fault(
        _is(ConnectionError, XetDownloadError),  # of hf_xet, which moves large files
        "the transfer broke off ({detail}); run the same command again, which goes on where it stopped",
        passes=True,
    ),
    _Fault(
        _is(httpx2.HTTPError, httpx2.InvalidURL),
        "{endpoint} cannot be asked ({detail}); check HF_ENDPOINT",
    ),
    _Fault(
        _is(FileMetadataError, httpx2.DecodingError, json.JSONDecodeError),
        "what answers at {endpoint} is no hub ({detail}); log in to this network in a browser if it asks for that, and check "
        "HTTPS_PROXY and HF_ENDPOINT",
        is_unreachable=True,
    ),
    _Fault(
        _has_number(*_FULL),
        "the disk of {cache} is full; make room there, or set HF_HOME to a folder on another disk",
    ),
    _Fault(
        _has_number(*REASONS),
        "the hub's cache {cache} cannot be written ({reason}); set HF_HOME to a folder that can be written",
    ),
    _Fault(
        _is_cut,
        "a file did not arrive whole; run the same command again, which keeps the files that are whole",
        passes=True,
    ),
)


def ask_hub(call: Callable[[], Answer], asked: Asked, *, tries_again: bool = True) -> Answer:
    """Return what a call of the hub's library returns; try again where a fault may pass.

    Raises:
        HubError: it failed for a reason that is known.
    """
    for wait in (*_WAITS, None):
        started = time.monotonic()
        try:
            return call()
        except Exception as error:
            found = _find_fault(error)
            if found is None:
                raise
            fault, cause = found
            text = _describe(fault, cause, asked)
            tries_again = tries_again and fault.passes and time.monotonic() - started < _PATIENCE
            if wait is None or not tries_again:
                raise HubError(text, is_unreachable=fault.is_unreachable) from error
            logger.warning("%s: %s (trying again in %d s)", asked, text.partition(";")[0], wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def explain_fault(error: BaseException, asked: Asked) -> str | None:
    """Return the sentence about an error that another library raised, or None where it is none of the hub's or the network's."""
    found = _find_fault(error)
    return None if found is None else _describe(*found, asked)


def _find_fault(error: BaseException) -> tuple[_Fault, BaseException] | None:
    """Return the row of an error, and the error that it is about: libraries wrap the first one."""
    for cause in reversed(list(_list_causes(error))):
        for fault in _FAULTS:
            if fault.matches(cause):
                return fault, cause
    return None


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from on purpose."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        # The library's errors with a status stand on an error of the connection's library, which says less.
        seen = None if isinstance(seen, HfHubHTTPError) else seen.__cause__


def _describe(fault: _Fault, error: BaseException, asked: Asked) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return fault.text.format(
        asked=asked,
        repository=asked.repository,
        revision=asked.revision,
        page=asked.page,
        endpoint=constants.ENDPOINT,
        cache=constants.HF_HUB_CACHE,
        status=_read_status(error),
        reason=REASONS.get(getattr(error, "errno", None) or 0, ""),
        detail=lines[0].rstrip(". "),
    )
