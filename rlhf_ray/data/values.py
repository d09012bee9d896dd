"""Values of a row as JSON knows them: checked before a template or a tokenizer stumbles over them.

What is wrong is a DataError without a place: the row's reader (data/columns.py) adds file and line.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import DataError

_DEEPEST = 32  # levels of nesting: no schema needs more, and Python's own JSON writer fails at some hundreds
_WIDEST = 1024  # bits of an integer: beyond some thousand digits Python refuses to write it


class EmptyRowError(DataError):
    """A row whose text is empty: the one fault that cleaning may leave out and count."""


def shown(value: Any) -> str:
    """The beginning of a value, for complaints: any value, of any size and depth."""
    try:
        text = reprlib.repr(value)
    except Exception:  # an object of somebody else's class, or an integer too long to be written
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def says_something(value: Any) -> bool:
    """False for what tables and exports fill their gaps with: None, blank text, an empty list or object."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, Mapping)) and len(value) == 0)


def without_padding(value: Any) -> Any:
    """A table's value without the keys that are None, at every depth.

    The content of a message (an object with a `role`) stays, for a template may ask whether it is none.
    """
    if isinstance(value, Mapping):
        return {
            key: without_padding(inner)
            for key, inner in value.items()
            if inner is not None or (key == "content" and "role" in value)
        }
    if isinstance(value, (list, tuple)):
        return [without_padding(inner) for inner in value]
    return value


def check_text(text: str) -> None:
    """Raises DataError for half of a character (a lone surrogate), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"holds half of a character (position {error.start}), which no tokenizer reads; "
            "remove it, or write the file again from its source"
        ) from error


def plain(value: Any, depth: int = 0) -> Any:
    """A copy of a JSON value.

    Raises DataError for what JSON cannot say (NaN, bytes, dates), for half characters, and for what is nested too
    deeply.
    """
    if depth > _DEEPEST:
        raise DataError(f"is nested more than {_DEEPEST} levels deep; flatten it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_text(value)
        return value
    if isinstance(value, int) and value.bit_length() <= _WIDEST:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError(f"holds an object with the key {shown(key)}, not text")
            check_text(key)
            copied[key] = plain(item, depth + 1)
        return copied
    raise DataError(f"holds {shown(value)} (type {type(value).__name__}), which JSON cannot say; write it as text")


def from_json(text: str) -> Any:
    """What JSON text says. Raises DataError where it is none, or says NaN or Infinity."""

    def refuse(name: str) -> Any:
        raise DataError(f"holds {name}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise DataError("is JSON that is nested too deeply") from error
    except ValueError as error:  # broken, or an integer of more digits than Python reads
        if isinstance(error, DataError):
            raise
        raise DataError(f"is no JSON ({shown(text)})") from error
