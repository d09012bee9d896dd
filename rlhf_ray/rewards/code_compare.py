"""What a sample returned or printed against what a test expects, compared where the sample is not."""

from __future__ import annotations

import json
import math
import re
from typing import Any

# LeetCode prints expected numbers with five decimals and accepts answers within as much.
TOLERANCE = 1e-5


class NotPlain(Exception):
    """A returned value that JSON has no form for."""


def plain(given: Any, seen: list | None = None) -> Any:
    """JSON's view of a value as `code_wire.Encoder` wrote it: tuples are lists; of a class that derives from a plain
    one, what its base holds; keys are texts.

    Raises:
        NotPlain: sets, objects, functions, and whatever else a sample may have written.
    """
    seen = [] if seen is None else seen
    if isinstance(given, list):
        made: Any = []
        seen.append(made)
        made += [plain(item, seen) for item in given]
        return made
    if not isinstance(given, dict):
        return given
    try:
        ((kind, content),) = given.items()
        return _plain_of(kind, content, seen)
    except (ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise NotPlain(f"{type(error).__name__}: {error}") from None


def _plain_of(kind: str, content: Any, seen: list) -> Any:
    if kind == "seen":
        return seen[content]
    if kind == "tuple":
        return [plain(item, seen) for item in content]
    if kind in ("dict", "mapping"):
        made: dict = {}
        seen.append(made)
        pairs = content if kind == "dict" else content[2]
        made.update({_key(plain(key, seen)): plain(value, seen) for key, value in pairs})
        return made
    if kind == "int":
        return int(content, 16)
    if kind == "kind of":
        return plain(content[0], seen)
    if kind == "scalar":
        return plain(content[1], seen)
    if kind == "array":
        place = len(seen)
        seen.append(None)
        seen[place] = _shaped([plain(item, seen) for item in content[2]], list(content[1]))
        return seen[place]
    raise NotPlain(f"a {kind} is not plain data")


def _shaped(flat: list, shape: list[int]) -> Any:
    if not shape:
        return flat[0]
    step = len(flat) // shape[0] if shape[0] else 0
    return [_shaped(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _key(key: Any) -> str:
    """As JSON writes it."""
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    raise NotPlain("a key is not plain data")


def same(got: Any, expected: Any) -> bool:
    """Equal as JSON; where a number is expected that has decimals, up to `TOLERANCE`, absolute or relative."""
    if isinstance(expected, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        if math.isnan(expected):
            return math.isnan(got)
        try:
            return got == expected or math.isclose(got, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        except OverflowError:  # an integer beyond floats
            return False
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, dict):
        return isinstance(got, dict) and got.keys() == expected.keys() and all(same(got[k], expected[k]) for k in got)
    return type(got) in (type(None), bool, int, float, str) and got == expected


def same_output(printed: str, expected: str) -> bool:
    """The same lines. Blanks at the ends of lines and empty lines at the end do not count, nor do blanks at the
    beginning of a line or between words, unless the expected line has such itself. Where a number is expected that has
    decimals, it is right up to `TOLERANCE`, absolute or relative.
    """
    ours, theirs = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    words, wanted = printed.split(), expected.split()
    return expected == " ".join(wanted) and len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    if not (re.fullmatch(number, printed) and re.fullmatch(number, expected) and re.search("[.eE]", expected)):
        return False
    return math.isclose(float(printed), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
