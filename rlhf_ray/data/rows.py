"""Rows of a data source, each with the place it came from, so that an error can name file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError

_LONGEST_CELL = 1 << 27  # characters; the csv module's own limit, 131,072, is less than a long document
OnBad = Callable[[DataError], None]
_FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Row:
    """One record; `where` is `file:line` (or `name:row` where there are no lines)."""

    fields: dict[str, Any]
    where: str


@contextmanager
def placed(where: str) -> Iterator[None]:
    """A DataError in here says where its row is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_rows(source: str, *, split: str = "train", on_bad: OnBad | None = None) -> Iterator[Row]:
    """Rows of a JSONL, CSV, parquet or plain text file, or of a Hugging Face dataset by name.

    `split` applies to datasets only. A text file gives one `{"text": line}` a non-empty line. Blank lines of a
    JSONL file are skipped. Raises DataError that names the file and line; with `on_bad`, an unreadable line goes
    there and reading goes on where that can be done.
    """
    for found in _read(source, split):
        if isinstance(found, Row):
            yield found
        elif on_bad is None:
            raise found
        else:
            on_bad(found)


def _read(source: str, split: str) -> Iterator[Row | DataError]:
    path = Path(source).expanduser()
    if path.suffix.lower() in _FILE_KINDS:
        if not path.is_file():
            raise DataError(f"{source}: no such file; give an existing .jsonl, .csv, .parquet or .txt path")
        return _readers()[path.suffix.lower()](path)
    return _hub_rows(source, split)


def _readers() -> dict[str, Any]:
    return {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _text}


def _lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Numbered lines, split at newlines only (str.splitlines would also split inside JSON strings at U+2028)."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8")


def _jsonl(path: Path) -> Iterator[Row | DataError]:
    for number, line in _lines(path):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            yield _json_row(line, f"{path}:{number}")


def _json_row(line: str, where: str) -> Row | DataError:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        why = "nested too deeply" if deep else f"{error.msg} at column {error.colno}"
        return DataError(f"{where}: broken JSON ({why}); each line must be one JSON object")
    if not isinstance(fields, dict):
        return DataError(
            f'{where}: a JSON {type(fields).__name__}, not an object; write one {{"prompt": ...}} object per line'
        )
    return Row(fields, where)


def _csv(path: Path) -> Iterator[Row | DataError]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(_LONGEST_CELL)
        reader = csv.DictReader(file, strict=True)
        try:
            if not reader.fieldnames:
                raise DataError(f"{path}: the file is empty; its first line must name the columns")
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                # DictReader hides both cases: too many cells go under None, too few become None.
                if None in fields or None in fields.values():
                    yield DataError(
                        f"{where}: the number of cells differs from the header ({len(reader.fieldnames)} columns); "
                        "quote cells that hold commas or line breaks"
                    )
                    continue
                yield Row(dict(fields), where)
        # After these two nobody knows where the next row begins.
        except UnicodeDecodeError as error:
            yield DataError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8")
        except csv.Error as error:
            yield DataError(
                f"{path}:{reader.line_num}: broken CSV ({error}); quote cells that hold commas, quotes or line breaks"
            )


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from error
    number = 0
    for batch in table.iter_batches():
        for fields in batch.to_pylist():
            number += 1
            yield Row(fields, f"{path}:{number}")


def _text(path: Path) -> Iterator[Row | DataError]:
    for number, line in _lines(path):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            yield Row({"text": line.rstrip("\r\n")}, f"{path}:{number}")


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    if name.startswith((".", "/", "~")):
        raise DataError(f"{name}: not a data file; give a path that ends in .jsonl, .csv, .parquet or .txt")
    from datasets import load_dataset

    repository, _, subset = name.partition(":")
    try:
        dataset = load_dataset(repository, subset or None, split=split)
    except Exception as error:  # load_dataset raises a dozen kinds, from network to schema errors
        raise DataError(
            f"{name}: cannot load this Hugging Face dataset, split {split!r} ({type(error).__name__}: {error}); "
            "check the name (owner/name, or owner/name:subset), the split and the network, or give a local file"
        ) from error
    for number, fields in enumerate(dataset):
        yield Row(dict(fields), f"{name}:{number}")
