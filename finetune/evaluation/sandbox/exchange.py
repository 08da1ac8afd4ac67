"""Pass plain values between two processes that do not trust each other, as lines of JSON.

Only values of the types below come out, never objects with methods of the sender. So a program cannot return something that
claims to be equal to everything.
"""

import collections
import collections.abc
import datetime
import decimal
import fractions
import itertools
import json
import types
from typing import IO, Any

_MOST_ITEMS, _MOST_BYTES = 1_000_000, 1 << 26
_KINDS: tuple[Any, ...] = (list, tuple, set, frozenset, collections.deque)
_VIEWS: dict[str, Any] = {
    "keys": collections.abc.KeysView,
    "items": collections.abc.ItemsView,
    "values": collections.abc.ValuesView,
}
# `datetime` extends `date`.
_WRITTEN: tuple[tuple[str, Any, Any], ...] = (
    ("Decimal", decimal.Decimal, decimal.Decimal.__str__),
    ("Fraction", fractions.Fraction, lambda value: [hex(value.numerator), hex(value.denominator)]),
    ("datetime", datetime.datetime, datetime.datetime.isoformat),
    ("date", datetime.date, datetime.date.isoformat),
    ("time", datetime.time, datetime.time.isoformat),
)
_LISTS: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
    "list": list,
    "deque": collections.deque,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "items": lambda items: dict(items).items(),
    "values": lambda items: dict(enumerate(items)).values(),
}


class Opaque:
    """Stands for a value that cannot be passed; equal to nothing but itself."""


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any]:
    """Read one message.

    Raises:
        EOFError: the other side has ended, or sent no message.
    """
    line = stream.readline(_MOST_BYTES)
    try:
        message = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise EOFError("the program ended before the tests did")
    return message


def pack(value: Any) -> Any:
    """Return a value in the form of JSON, by its exact contents; a subclass becomes the plain type that it extends."""
    if value is None or value is True or value is False:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return {"type": plain.__name__, "value": _write_plain(plain, value)}
    if isinstance(value, complex):
        return {"type": "complex", "value": [complex.__repr__(value)]}
    if isinstance(value, bytes | bytearray):
        return {"type": "bytes", "value": bytes(value).hex()}
    if isinstance(value, range):
        return {"type": "range", "value": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"type": "dict", "value": [[pack(key), pack(item)] for key, item in dict.items(value)]}
    for kind in _KINDS:
        if isinstance(value, kind):
            return {"type": kind.__name__, "value": [pack(item) for item in kind.__iter__(value)]}
    if isinstance(value, types.GeneratorType | collections.abc.Iterator):
        return {"type": "iterator", "value": [pack(item) for item in itertools.islice(value, _MOST_ITEMS)]}
    for name, view in _VIEWS.items():
        if isinstance(value, view):
            return {"type": name, "value": [pack(item) for item in value]}
    for name, kind, write in _WRITTEN:
        if isinstance(value, kind):
            return {"type": name, "value": write(value)}
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return pack(value.item())  # a scalar of numpy
    return {"type": "opaque", "value": None}


def _write_plain(plain: type, value: Any) -> str:
    if plain is int:
        return hex(int.__index__(value))
    return float.hex(value) if plain is float else str.__str__(value)


def unpack(packed: Any) -> Any:
    """Return the value of `pack`.

    Raises:
        ValueError: it is not what `pack` returns.
    """
    if packed is None or isinstance(packed, bool):
        return packed
    if not isinstance(packed, dict) or "type" not in packed or "value" not in packed:
        raise ValueError("no packed value")
    kind, value = packed["type"], packed["value"]
    try:
        if kind in _LISTS:
            return _LISTS[kind]([unpack(item) for item in value])
        if kind == "dict":
            return {unpack(key): unpack(item) for key, item in value}
        if kind in _PLAIN:
            return _PLAIN[kind](value)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(str(error)) from error
    return Opaque()


_PLAIN: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "str": lambda text: str(text),
    "complex": lambda parts: complex(parts[0]),
    "bytes": bytes.fromhex,
    "Decimal": decimal.Decimal,
    # Not from a text, whose exponent could ask for a number of any size.
    "Fraction": lambda parts: fractions.Fraction(*(int(text, 16) for text in parts)),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "range": lambda parts: range(*map(int, parts)),
}
