"""Rows as files of every kind that a data source may be, and ways to spoil the bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

# What JSON text is broken by, whatever the reader thinks of it.
GARBAGE = [b'{"prompt": "x"', b"not a row", b"[1, 2]", b"null", b"42", b'"text"', b'{"a": 1} {"b": 2}', b"{'a': 1}",
           b",", b'{"a": NaN, "b": 01}', b'{"text": "a", "text": "b"}', b'{"a": "\t"}', b"\xff\xfe", b"// a comment",
           b"[" * 5000, b'{"a":' * 5000, b"9" * 5000]  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(rows: Sequence[Any]) -> bytes:
    return "".join(_json(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _array(rows: Sequence[Any], indent: int | None = None) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")


def _separated(rows: Sequence[Any], separator: str) -> bytes:
    rows = [row if isinstance(row, dict) else {"row": row} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow([str(name) for name in names])
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else _json(value)


def _table(rows: Sequence[Any]) -> pyarrow.Table:
    """A column of values of several types becomes JSON text, as people's exports do."""
    rows = [row if isinstance(row, dict) else {"row": row} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            array = pyarrow.array(values)
            array.validate(full=True)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            array = pyarrow.array([None if value is None else json.dumps(value) for value in values])
        columns[name.encode("utf-8", "backslashreplace").decode()] = array
    return pyarrow.table(columns)


def _parquet(rows: Sequence[Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(_table(rows), buffer)
    except pyarrow.ArrowException:  # an empty object is a struct without fields, which parquet does not know
        pyarrow.parquet.write_table(_table([{"row": _json(row)} for row in rows]), buffer)
    return buffer.getvalue()


def _arrow(rows: Sequence[Any], *, stream: bool) -> bytes:
    table, buffer = _table(rows), io.BytesIO()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Sequence[Any]], bytes]] = {
    ".jsonl": _lines,
    ".json": _array,
    "pretty.json": lambda rows: _array(rows, indent=2),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "lines.json": _lines,
    ".csv": lambda rows: _separated(rows, ","),
    ".tsv": lambda rows: _separated(rows, "\t"),
    ".parquet": _parquet,
    ".arrow": lambda rows: _arrow(rows, stream=False),
    "stream.arrow": lambda rows: _arrow(rows, stream=True),
    ".jsonl.gz": _lines,
    ".csv.gz": lambda rows: _separated(rows, ","),
    "folder": _lines,
}
BINARY = {".parquet", ".arrow", "stream.arrow"}


def _inserted(random: Random, data: bytes, what: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + what + data[at:]


def _flipped(random: Random, data: bytes) -> bytes:
    if not data:
        return data
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def _with_line(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    lines.insert(random.randrange(len(lines)), random.choice(GARBAGE))
    return b"\n".join(lines)


def _recoded(data: bytes, encoding: str) -> bytes:
    return data.decode("utf-8", "replace").encode(encoding, "replace")


BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "the file has a byte-order mark": lambda _, data: b"\xef\xbb\xbf" + data,
    "the file is UTF-16": lambda _, data: _recoded(data, "utf-16"),
    "the file is Latin-1": lambda random, data: _inserted(random, _recoded(data, "latin-1"), b"\xe9t\xe9"),
    "the file has Windows line ends": lambda _, data: data.replace(b"\n", b"\r\n"),
    "the file has old Mac line ends": lambda _, data: data.replace(b"\n", b"\r"),
    "the file is cut short": lambda random, data: data[: random.randrange(len(data) + 1)],
    "the file has no last line end": lambda _, data: data.rstrip(b"\n"),
    "the file has NUL bytes": lambda random, data: _inserted(random, data, b"\0\0"),
    "the file has NUL bytes at its end": lambda _, data: data + b"\0" * 512,
    "the file has blank lines": lambda _, data: data.replace(b"\n", b"\n\n \t\n"),
    "the file has a broken line": _with_line,
    "the file has a comma at its end": lambda _, data: data.rstrip() + b",\n",
    "the file is empty": lambda *_: b"",
    "the file is blank": lambda *_: b" \n\n\t\n",
    "the file is there twice": lambda _, data: data + data,
    "the file is one line": lambda _, data: data.replace(b"\n", b" "),
    "the file is random": lambda random, _: random.randbytes(2000),
    "a byte is another": _flipped,
    "ten bytes are others": lambda random, data: _all(data, *(lambda d: _flipped(random, d) for _ in range(10))),
    "a quote more": lambda random, data: _inserted(random, data, b'"'),
    "a bracket less": lambda _, data: data.replace(b"]", b"", 1),
    "packed twice": lambda _, data: gzip.compress(data),
}


def _all(data: bytes, *changes: Callable[[bytes], bytes]) -> bytes:
    for change in changes:
        data = change(data)
    return data


def write_file(
    rows: Sequence[Any], form: str, changes: Sequence[Callable[[Random, bytes], bytes]], random: Random, folder: Path
) -> Path:
    """The rows as a file in `folder`, its bytes changed; what is packed is changed before that, or after it."""
    data = WRITERS[form](rows)
    packed = form.endswith(".gz")
    before = packed and random.random() < 0.5
    for change in changes if before or not packed else ():
        data = change(random, data)
    if packed:
        data = gzip.compress(data, mtime=0)
        for change in () if before else changes:
            data = change(random, data)
    if form == "folder":
        (folder / "rows").mkdir()
        (folder / "rows" / "train.jsonl").write_bytes(data)
        return folder / "rows"
    path = folder / ("rows" + form if form.startswith(".") else form)
    path.write_bytes(data)
    return path
