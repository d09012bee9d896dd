"""Plain data between a sandboxed process and what asks it: one JSON object a line, over pipes.

Standard library only: this file's code is also run inside the sandbox, where the package is not. What is read is
data and stays data: no message makes the reader import, call or build anything but the types that are listed here.
"""

from __future__ import annotations

import collections
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
    ("datetime", "time"): lambda v: [v.hour, v.minute, v.second, v.microsecond, _zone(v)],
    ("datetime", "datetime"): lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, _zone(v)],
    ("datetime", "timezone"): lambda v: list(v.__getinitargs__()),
    ("zoneinfo", "ZoneInfo"): lambda v: [v.key],
    ("uuid", "UUID"): lambda v: [v.hex],
}
# And those that can be changed.
_MAPPINGS = {"OrderedDict", "Counter", "defaultdict"}


class Unsendable(Exception):
    """A value that is neither plain data nor anything that this side may refer to."""


class Encoder:
    """Turns the values of one message into JSON.

    `containers` holds the lists, dicts, sets, arrays and whatever else can be changed, in the order in which they were
    met; one met again becomes a reference to its place. The reader's `Decoder.containers` has the same order.

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
        if kind in (list, dict, set, bytearray) or _is_changeable(kind, value):
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
        if known in _LISTED and getattr(sys.modules.get(known[0]), known[1], None) is kind:
            return {"known": [*known, self.encode(_LISTED[known](value))]}
        numpy = sys.modules.get("numpy") if kind.__module__ == "numpy" else None
        if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in _PLAIN_KINDS:
            return {"scalar": [value.dtype.str, self.encode(value.item())]}
        return self.other(value)

    def contents(self, value: Any) -> Any:
        """Of one container, as it stands: its items may be references."""
        if isinstance(value, list):
            return list(value) if _simple(value) else [self.encode(item) for item in value]
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            if type(value) is dict:
                return {"dict": pairs}
            return {"mapping": [type(value).__name__, self.encode(getattr(value, "default_factory", None)), pairs]}
        if isinstance(value, bytearray):
            return {"bytearray": value.hex()}
        if isinstance(value, set):
            return {"set": [self.encode(item) for item in value]}
        if isinstance(value, collections.deque):
            return {"deque": [value.maxlen, [self.encode(item) for item in value]]}
        return {"array": [value.dtype.str, list(value.shape), self.contents(value.ravel().tolist())]}


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
        if kind in ("mapping", "deque", "array"):
            made = getattr(self, f"_{kind}")(*content)
            self.containers.append(made)
            if kind != "array":
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
        if kind == "scalar":
            return _numpy_type(content[0]).type(self.decode(content[1]))
        return self.other(given)

    def fill(self, container: Any, given: Any) -> None:
        """Give a container the contents that `Encoder.contents` read."""
        if isinstance(container, list):
            container[:] = given if _simple(given) else [self.decode(item) for item in given]
        elif isinstance(container, dict):
            pairs = given["dict"] if "dict" in given else given["mapping"][2]
            items: Any = [(self.decode(key), self.decode(item)) for key, item in pairs]
            container.clear()
            container.update(dict(items))
        elif isinstance(container, bytearray):
            container[:] = bytes.fromhex(given["bytearray"])
        elif isinstance(container, set):
            items = [self.decode(item) for item in given["set"]]
            container.clear()
            container.update(items)
        elif isinstance(container, collections.deque):
            items = [self.decode(item) for item in given["deque"][1]]
            container.clear()
            container.extend(items)
        else:
            array = self._array(*given["array"])
            if container.shape != array.shape:
                container.resize(array.shape, refcheck=False)
            container[...] = array

    def _listed(self, module: str, name: str, parts: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*self.decode(parts))

    def _mapping(self, name: str, factory: Any, pairs: list) -> Any:
        if name not in _MAPPINGS:
            raise ValueError(f"{name!r} is no kind of dict")
        return getattr(collections, name)(*[self.decode(factory)] if name == "defaultdict" else [])

    def _deque(self, maxlen: int | None, items: list) -> Any:
        return collections.deque(maxlen=maxlen)

    def _array(self, dtype: str, shape: list, items: list) -> Any:
        import numpy

        made: list = []
        self.fill(made, items)
        return numpy.array(made, dtype=_numpy_type(dtype)).reshape(shape)


def _is_changeable(kind: type, value: Any) -> bool:
    if kind.__module__ == "collections":
        return kind.__name__ in (*_MAPPINGS, "deque") and getattr(collections, kind.__name__) is kind
    if kind.__module__ != "numpy":
        return False
    numpy = sys.modules.get("numpy")
    return kind is getattr(numpy, "ndarray", None) and value.dtype.kind in _PLAIN_KINDS


def _numpy_type(dtype: str) -> Any:
    import numpy

    found = numpy.dtype(dtype)
    if found.kind not in _PLAIN_KINDS:
        # A forged reply: an array of objects could not be sent on, and would count as a test that cannot be judged.
        raise ValueError(f"numpy's {dtype} is not plain data")
    return found


def _zone(value: Any) -> Any:
    """Of a time: its zone, where that is the library's; of any other what it says of this time."""
    zone = value.tzinfo
    library = zone is None or (type(zone).__module__, type(zone).__qualname__) in _LISTED
    if library and getattr(zone, "key", "") is not None:
        return zone
    offset = value.utcoffset()
    if offset is None:
        raise Unsendable("a time in a zone that does not know its distance from UTC")
    return sys.modules["datetime"].timezone(offset, str(value.tzname()))


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
