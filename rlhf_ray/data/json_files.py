"""JSON files of rows: an object a line (JSONL), an array of objects, or an object that holds one under "data".

The contents decide, not the suffix: many JSONL files are called .json, and some arrays .jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_ray.data.text_files import Found, not_utf8, numbered_lines, opened
from rlhf_ray.errors import DataError

# The key under which an object holds the rows of the whole file, as in `{"version": "1.0", "data": [...]}`.
ROWS_KEY = "data"
_BLANKS = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):  # json itself keeps the last and says nothing
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
# A JSONDecodeError is a ValueError, and so is a number of more digits than Python reads.
_BROKEN = (ValueError, RecursionError)


def json_rows(path: Path) -> Iterator[Found]:
    """Rows with the line on which each begins. Blank lines are skipped."""
    lines = numbered_lines(path)
    first = next(((number, line) for number, line in lines if isinstance(line, DataError) or line.strip()), None)
    if first is None:
        return
    if _is_one_value(first[1], lines_after := _Peeked(lines)):
        yield from _whole_file(path)
    else:
        for number, line in chain([first], lines_after):
            if isinstance(line, DataError):
                yield line
            elif line.strip():
                yield _line_row(line, f"{path}:{number}")


class _Peeked:
    """Numbered lines, of which `is_blank` looks at those up to the next with something in it."""

    def __init__(self, lines: Iterator[tuple[int, str | DataError]]):
        self._lines = lines

    def is_blank(self) -> bool:
        """Whether nothing but blank lines follows."""
        for number, line in self._lines:
            if isinstance(line, DataError) or line.strip():
                self._lines = chain([(number, line)], self._lines)
                return False
        return True

    def __iter__(self) -> Iterator[tuple[int, str | DataError]]:
        return iter(self._lines)


def _is_one_value(line: str | DataError, following: _Peeked) -> bool:
    """Whether a file is one JSON value, judged by its first line: an array, an object on several lines, or rows."""
    if isinstance(line, DataError):
        return False
    try:
        value = json.loads(line)
    except _BROKEN:
        # `{` or `{"version": 1,` goes on in the next line; `{"prompt": "x"` is a broken line of JSONL.
        text = line.strip()
        return text.startswith("[") or (text.startswith("{") and text.endswith(("{", "[", ",", ":")))
    return (isinstance(value, list) or _rows_in(value) is not None) and following.is_blank()


def _rows_in(value: Any) -> list[Any] | None:
    rows = value.get(ROWS_KEY) if isinstance(value, dict) else None
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


def _line_row(line: str, where: str) -> Found:
    try:
        fields = _DECODER.decode(line)
    except _BROKEN as error:
        return DataError(f"{where}: broken JSON ({_reason(error)}); each line must be one JSON object")
    if not isinstance(fields, dict):
        return DataError(
            f'{where}: a JSON {type(fields).__name__}, not an object; write one {{"prompt": ...}} object per line'
        )
    return where, fields


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _whole_file(path: Path) -> Iterator[Found]:
    with opened(path) as file:
        raw = file.read()
    try:
        document = _Document(path, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield not_utf8(f"{path}:{raw.count(10, 0, error.start) + 1}", error)
        return
    try:
        yield from document.rows()
    except _BROKEN as error:
        # Behind a broken value nobody knows where the next row begins.
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else document.where()
        yield DataError(
            f"{where}: broken JSON ({_reason(error)}); the file must be one array of objects, or one object a line"
        )


class _Document:
    """A JSON text that is read value by value, for Python's decoder does not say where a value began."""

    def __init__(self, path: Path, text: str):
        self._path, self._text = path, text
        self._at, self._line, self._counted = 0, 1, 0

    def rows(self) -> Iterator[Found]:
        """Of an array its elements; of an object those of the array under ROWS_KEY, or itself."""
        if self._next() == "[":
            yield from self._elements()
        else:
            start = self._at
            where = self.where()
            value = self._value()
            self._end()
            if _rows_in(value) is None:
                yield where, value
                return
            self._at = start
            yield from self._member_rows()
            return
        self._end()

    def _member_rows(self) -> Iterator[Found]:
        """The elements under ROWS_KEY of an object that is known to be sound."""
        while self._next() != "}":
            self._at += 1  # the brace, or the comma between two members
            self._next()
            key = self._value()
            self._next()
            self._at += 1  # the colon
            self._next()
            if key == ROWS_KEY:
                yield from self._elements()
            else:
                self._value()

    def _elements(self) -> Iterator[Found]:
        self._at += 1
        if self._next() == "]":
            self._at += 1
            return
        while True:
            self._next()
            where = self.where()
            value = self._value()
            if isinstance(value, dict):
                yield where, value
            else:
                yield DataError(f"{where}: a JSON {type(value).__name__}, not an object; an array must hold one a row")
            mark = self._next()
            if mark not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
            self._at += 1
            if mark == "]":
                return

    def _value(self) -> Any:
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        return value

    def _next(self) -> str:
        """The next character that is no blank; empty at the end."""
        self._at = _BLANKS.match(self._text, self._at).end()
        return self._text[self._at : self._at + 1]

    def _end(self) -> None:
        if self._next():
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def where(self) -> str:
        """`file:line` of the value that is read next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._path}:{self._line}"
