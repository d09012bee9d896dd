"""Plain data between a sandboxed process and what asks it: one JSON object a line, over pipes.

Standard library only: this file's code is also run inside the sandbox, where the package is not. What is read is
data and stays data: no message makes the reader import, call or build anything but the types that are listed here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any

_SCALARS = {type(None), bool, str, float}
_PLAIN_KINDS = "biufcUS"  # of numpy's types: numbers, truths, texts, bytes
_LARGE = 1 << 63  # integers beyond travel in hexadecimal: Python refuses to read long decimal ones

# Types of the standard library that are data as much as a list is: (module, name) -> what makes one again.
_LISTED: dict[tuple[str, str], Callable[[Any], list]] = {
    ("fractions", "Fraction"): lambda v: [v.numerator, v.denominator],
    ("decimal", "Decimal"): lambda v: [str(v)],
    ("datetime", "timedelta"): lambda v: [v.days, v.seconds, v.microseconds],
    ("datetime", "date"): lambda v: [v.year, v.month, v.day],
    ("datetime", "time"): lambda v: [v.hour, v.minute, v.second, v.microsecond],
    ("datetime", "datetime"): lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    ("collections", "deque"): lambda v: [list(v), v.maxlen],
    ("collections", "OrderedDict"): lambda v: [list(v.items())],
    ("collections", "Counter"): lambda v: [dict(v)],
    ("collections", "defaultdict"): lambda v: [None, dict(v)],
    ("uuid", "UUID"): lambda v: [v.hex],
}


class Unsendable(Exception):
    """A value that is neither plain data nor anything that this side may refer to."""


class Encoder:
    """Turns the values of one message into JSON.

    `containers` holds the lists, dicts and sets met so far, in order; one met again becomes a reference to its
    place. The reader's `Decoder.containers` has the same order.

    Args:
        other: gives the JSON of a value that is not plain data, or raises Unsendable.
    """

    def __init__(self, other: Callable[[Any], Any], containers: list | None = None) -> None:
        self.other = other
        self.containers = containers if containers is not None else []
        self._place = {id(container): place for place, container in enumerate(self.containers)}

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is int:
            return value if -_LARGE < value < _LARGE else {"int": hex(value)}
        if kind in (list, dict, set, bytearray):
            place = self._place.setdefault(id(value), len(self.containers))
            if place < len(self.containers):
                return {"seen": place}
            self.containers.append(value)
            return self.contents(value)
        if kind in (tuple, frozenset):
            return {kind.__name__: [self.encode(item) for item in value]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind in (range, slice):
            return {kind.__name__: [self.encode(part) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
        known = (kind.__module__, kind.__qualname__)
        listed = known in _LISTED and getattr(sys.modules.get(known[0]), known[1], None) is kind
        if listed and getattr(value, "tzinfo", None) is None:
            return {"known": [*known, self.encode(_LISTED[known](value))]}
        if kind.__module__ == "numpy" and (array := self._numpy(value)) is not None:
            return array
        return self.other(value)

    def contents(self, value: Any) -> Any:
        """Of one container, as it stands: its items may be references."""
        if isinstance(value, list):
            return list(value) if _simple(value) else [self.encode(item) for item in value]
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, bytearray):
            return {"bytearray": value.hex()}
        return {"set": [self.encode(item) for item in value]}

    def _numpy(self, value: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if isinstance(value, numpy.ndarray) and value.dtype.kind in _PLAIN_KINDS:
            return {"array": [value.dtype.str, list(value.shape), self.encode(value.ravel().tolist())]}
        if isinstance(value, numpy.generic) and value.dtype.kind in _PLAIN_KINDS:
            return {"scalar": [value.dtype.str, self.encode(value.item())]}
        return None


class Decoder:
    """Turns JSON into values again. `other` gives the value of an object with an unknown key."""

    def __init__(self, other: Callable[[dict], Any]) -> None:
        self.other = other
        self.containers: list = []

    def decode(self, given: Any) -> Any:
        if isinstance(given, list):
            made: Any = []
            self.containers.append(made)
            self.fill(made, given)
            return made
        if not isinstance(given, dict):
            return given
        ((kind, content),) = given.items() if len(given) == 1 else ((None, None),)
        if kind == "seen":
            return self.containers[content]
        if kind in ("dict", "set", "bytearray"):
            made = {"dict": dict, "set": set, "bytearray": bytearray}[kind]()
            self.containers.append(made)
            self.fill(made, given)
            return made
        if kind in ("tuple", "frozenset"):
            return {"tuple": tuple, "frozenset": frozenset}[kind](self.decode(item) for item in content)
        if kind in ("range", "slice", "complex"):
            return {"range": range, "slice": slice, "complex": complex}[kind](*map(self.decode, content))
        if kind == "int":
            return int(content, 16)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "ellipsis":
            return Ellipsis
        if kind == "known" and tuple(content[:2]) in _LISTED:
            return self._listed(*content)
        if kind in ("array", "scalar"):
            return self._numpy(*content)
        return self.other(given)

    def fill(self, container: Any, given: Any) -> None:
        """Give a container the contents that `Encoder.contents` read."""
        if isinstance(container, list):
            container[:] = given if _simple(given) else [self.decode(item) for item in given]
        elif isinstance(container, dict):
            pairs = [(self.decode(key), self.decode(item)) for key, item in given["dict"]]
            container.clear()
            container.update(pairs)
        elif isinstance(container, bytearray):
            container[:] = bytes.fromhex(given["bytearray"])
        else:
            items = [self.decode(item) for item in given["set"]]
            container.clear()
            container.update(items)

    def _listed(self, module: str, name: str, parts: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*self.decode(parts))

    def _numpy(self, dtype: str, *content: Any) -> Any:
        import numpy

        if numpy.dtype(dtype).kind not in _PLAIN_KINDS:
            # A forged reply: an array of objects could not be sent on, and would count as a test that cannot be judged.
            raise ValueError(f"numpy's {dtype} is not plain data")
        if len(content) == 1:
            return numpy.dtype(dtype).type(self.decode(content[0]))
        shape, items = content
        return numpy.array(self.decode(items), dtype=dtype).reshape(shape)


def _simple(items: list) -> bool:
    """Nothing to convert: the usual case of a long list, without a call an item."""
    kinds = set(map(type, items))
    if kinds <= _SCALARS:
        return True
    return kinds == {int} and min(items) > -_LARGE and max(items) < _LARGE


class Wire:
    """Two pipes to the other side. Raises EOFError once it is gone."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self._lines = self._read()

    def send(self, message: dict) -> None:
        left = memoryview(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        try:
            while left:
                left = left[os.write(self.writing, left) :]
        except BrokenPipeError as error:
            raise EOFError("the other side is gone") from error

    def receive(self) -> dict:
        for line in self._lines:
            return json.loads(line)
        raise EOFError("the other side is gone")

    def _read(self) -> Iterator[bytes]:
        rest: list[bytes] = []
        while chunk := os.read(self.reading, 1 << 16):
            *lines, last = chunk.split(b"\n")
            for line in lines:
                yield b"".join([*rest, line])
                rest = []
            rest.append(last)
