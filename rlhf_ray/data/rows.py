"""Rows of a data source, each with the place it came from, so that an error can name file and line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import shipped
from rlhf_ray.config.given import GivenRows, was_given
from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.data.json_files import json_rows
from rlhf_ray.data.paths import HUB_PREFIX, absent, files_of_split, kind_of, looks_local, unreadable
from rlhf_ray.data.tables import arrow_rows, given_rows, hub_rows, is_saved_dataset, parquet_rows, saved_rows
from rlhf_ray.data.text_files import Found, csv_rows, text_rows, tsv_rows
from rlhf_ray.data.trees import TreeForm, assembled
from rlhf_ray.errors import DataError

OnBad = Callable[[DataError], None]
_TEXT_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".ndjson": json_rows,
    ".jsonlines": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": text_rows,
}
READERS = {
    **_TEXT_READERS,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    **{f"{suffix}.gz": reader for suffix, reader in _TEXT_READERS.items()},
}


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


def read_rows(
    source: str,
    *,
    split: str = "train",
    on_bad: OnBad | None = None,
    trees_as: TreeForm | None = "messages",
    dropped: Counter[str] | None = None,
) -> Iterator[Row]:
    """Rows of a local file or folder, of a Hugging Face dataset by name, or of a file of this package (`shipped:...`).

    Files: JSONL, JSON arrays, CSV, TSV, plain text (one `{"text": line}` a non-empty line), each also gzipped; parquet
    and Arrow. Folders: of `datasets.save_to_disk`, or with files named after the split. `split` applies to folders and
    Hub datasets only, and to rows that Python gave by split. OpenAssistant's message rows become rows of the type
    `trees_as` (None: they stay as they are), and what is left out of them is counted in `dropped` by reason.
    Raises DataError that names the file and line; with `on_bad`, an unreadable line goes there and reading goes on
    where that can be done.
    """
    for found in assembled(_read(source, split), trees_as, dropped if dropped is not None else Counter()):
        if not isinstance(found, DataError):
            where, fields = found
            yield Row(fields, where)
        elif on_bad is None:
            raise found
        else:
            on_bad(found)


def _read(source: str, split: str) -> Iterator[Found]:
    if isinstance(source, GivenRows):
        yield from given_rows(source, split)
    elif was_given(source):
        raise DataError(
            f"{source}: rows that were given from Python are in no file; give them again from Python, with the same "
            "config"
        )
    elif source.startswith(HUB_PREFIX):
        yield from hub_rows(source.removeprefix(HUB_PREFIX), split)
    elif source.startswith(shipped.PREFIX):
        yield from _read_file(source, shipped.shipped_rows(source))
    elif not looks_local(source):
        yield from hub_rows(source, split)
    else:
        yield from _read_local(source, typed_path(source), split)


def _read_local(source: str, path: Path, split: str) -> Iterator[Found]:
    if is_folder(path):
        if is_saved_dataset(path):
            yield from saved_rows(path, split)
            return
        for file in files_of_split(source, path, split, READERS):
            yield from _read_file(str(file), file)
    elif not os.path.exists(path):
        raise absent(source, path, READERS)
    else:
        yield from _read_file(source, path)


def _read_file(source: str, path: Path) -> Iterator[Found]:
    kind = kind_of(path, READERS)
    if kind is None:
        raise unreadable(source, path, READERS)
    try:
        yield from READERS[kind](path)
    except DataError as error:  # a file that is no more readable from here on: a complaint like those about its rows
        yield error
