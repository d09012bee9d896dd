"""What rows say, as a short text that two readings can be compared by: of content and order, not of any template; and
the same of a chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf_ray.data.rows import Row
from rlhf_ray.errors import DataError


class Fingerprint:
    """Grows with each row that is read. A row counts with all its columns: rewards read those that no prompt shows."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.rows = 0

    def add(self, fields: Mapping[str, Any], where: str) -> None:
        """Raises DataError for a row that is nested too deeply to be written down."""
        try:
            text = json.dumps(fields, sort_keys=True, default=_plain)  # the order of columns says nothing
        except TypeError:
            text = _without_addresses(repr(fields))  # keys that are no texts
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply; flatten the row") from error
        self._digest.update(hashlib.blake2b(text.encode(), digest_size=16).digest())  # of one length: no two rows merge
        self.rows += 1

    def watching(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows; each counts once it is taken."""
        for row in rows:
            self.add(row.fields, row.where)
            yield row

    @property
    def value(self) -> str:
        return f"{self.rows} rows {self._digest.hexdigest()}"


# Under this name a template's fingerprint stands beside those of rows.
CHAT_TEMPLATE = "the chat template"


def fingerprint_of_template(template: str | Mapping[str, str] | None) -> str:
    """Of what a tokenizer has: a text, several by name, or nothing."""
    if template is None:
        return "none"
    # A tokenizer that was saved and loaded has read its template as a text file: with other ends of lines.
    text = json.dumps(template, sort_keys=True).replace(r"\r\n", r"\n")
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no word for: bytes, dates and decimals of a parquet file, images and arrays of a Hub dataset."""
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if hasattr(value, "tobytes"):
        return [type(value).__name__, _plain(value.tobytes())]
    return _without_addresses(repr(value))


def _without_addresses(text: str) -> str:
    """An object that prints where it lies in memory lies elsewhere in the next process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
