"""Keep what is printed safe and short: no text from outside moves the cursor, hides or reorders text, and libraries are quiet."""

import contextlib
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

# C0 and C1 control characters but tab and newline, DEL, the characters that reorder text (embeddings, overrides, isolates), and halves
# of characters, which cannot be written: Python reads a file name that is no UTF-8 into them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
COLOUR, PLAIN_TEXT = "\x1b[32m", "\x1b[0m"  # the only sequences that the kit prints itself
_OWN = re.compile(f"({re.escape(COLOUR)}|{re.escape(PLAIN_TEXT)})")


def escape_controls(text: str, *, keeps_colour: bool = False) -> str:
    """Return a text with its control characters written as `\\x1b`, `\\u202e` and so on; the kit's own colours may stay."""
    if not keeps_colour:
        return _CONTROLS.sub(_name, text)
    parts = _OWN.split(text)
    return "".join(part if number % 2 else _CONTROLS.sub(_name, part) for number, part in enumerate(parts))


def escape_json(text: str) -> str:
    """Return a JSON text whose control characters are written by JSON's own escapes, so that it holds the same values."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _name(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


@contextlib.contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """End the block by a `TimeoutError` after so many seconds; only in the main thread of systems that have alarms.

    Raises:
        TimeoutError: the block took longer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # a program that uses this kit may have set one of its own


def silence_libraries() -> None:
    """Suppress the notes and warnings of libraries, also of those that are loaded later."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("bitsandbytes", "accelerate", "trl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Users cannot act on deprecations inside the libraries. The kit's tests turn them into errors.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
