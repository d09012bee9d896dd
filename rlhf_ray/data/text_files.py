"""Text files of rows: CSV, TSV and plain text, plain or gzipped, each row with its line. JSON is in json_files.py."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from rlhf_ray.errors import DataError

# What a reader finds: (`file:line`, the row's fields), or what is wrong with a row, after which it goes on if it can.
Found: TypeAlias = tuple[str, dict[str, Any]] | DataError

_LONGEST_CELL = 1 << 27  # characters; the csv module's own limit, 131,072, is less than a long document


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its name ends in .gz. Raises DataError where it cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: broken gzip data ({error}); the file is cut off or was never packed: fetch or pack it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error


def not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8 (Excel calls it CSV UTF-8; from the Chinese GBK: "
        "iconv -f GBK -t UTF-8)"
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Numbered lines, split at newlines only (str.splitlines would also split inside JSON strings at U+2028)."""
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, not_utf8(f"{path}:{number}", error)


def text_rows(path: Path) -> Iterator[Found]:
    """One `{"text": line}` a line that is not blank."""
    for number, line in numbered_lines(path):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def csv_rows(path: Path) -> Iterator[Found]:
    return _separated(path, ",", "commas")


def tsv_rows(path: Path) -> Iterator[Found]:
    return _separated(path, "\t", "tabs")


def _separated(path: Path, separator: str, separators: str) -> Iterator[Found]:
    """Rows under a header. `where` names the line on which a row ends. Cells in quotes may hold anything."""
    csv.field_size_limit(_LONGEST_CELL)
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader, ends = csv.DictReader(file, delimiter=separator, strict=True), 1
        try:
            names = reader.fieldnames = _header(path, reader.fieldnames, separator)
            for fields in reader:
                ends = reader.line_num
                where = f"{path}:{ends}"
                # DictReader hides both cases: too many cells go under None, too few become None.
                if None in fields or None in fields.values():
                    yield DataError(
                        f"{where}: the number of cells differs from the header ({len(names)} columns); "
                        f"quote cells that hold {separators} or line breaks"
                    )
                    continue
                yield where, dict(fields)
        # After these two nobody knows where the next row begins.
        except UnicodeDecodeError:
            # The decoder works ahead of the rows, so the line is looked for.
            yield next(line for _, line in numbered_lines(path) if isinstance(line, DataError))
        except csv.Error as error:
            yield DataError(
                f"{path}:{ends + 1}: broken from here on ({error}); quote cells that hold {separators}, quotes or line "
                "breaks, and write a quote in them twice"
            )


def _header(path: Path, given: Any, separator: str) -> list[str]:
    """The names of the columns, without blanks around them. One without a name (pandas' index, what Excel leaves behind
    the last column) gets the name of its place."""
    if not given:
        raise DataError(f"{path}: the file is empty; its first line must name the columns")
    names = [name.strip() or f"column {place}" for place, name in enumerate(given, start=1)]
    if names[0].lower().startswith("sep="):
        raise DataError(f"{path}:1: this line is Excel's mark of the separator, not a header; remove it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}:1: the column {twice[0]!r} comes twice, and a row keeps only one of them; rename one")
    other = next((mark for mark in (";", "\t", ",", "|") if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        raise DataError(
            f"{path}:1: the header is one column, {names[0]!r}, so the cells seem to be separated by {other!r}; "
            "separate them by commas (.csv) or tabs (.tsv)"
        )
    return list(names)
