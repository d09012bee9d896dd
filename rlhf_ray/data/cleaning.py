"""Cleaning: what is left out of a dataset, counted by reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rlhf_ray.config.data import CleaningConfig, ColumnsConfig, DataType
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.rows import Row
from rlhf_ray.data.types import PreferenceRow, Record, detect, parse
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

# Reasons, as reports and logs name them.
EMPTY, DUPLICATE, IDENTICAL = "empty", "duplicate", "identical answers"
SHORT, LONG, TIED, UNWANTED = "answer too short", "too long", "equal scores", "labelled as bad"


@dataclass(frozen=True)
class CleaningReport:
    """Of `rows` rows of `source`, `kept` examples were made; `dropped` counts the others by reason, `cut` those cut.

    `read` is the fingerprint of the rows as they stand there.
    `unused` counts the rows that have a column, or a key of their messages, which nothing reads.
    """

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    cut: int = 0
    read: str = ""
    unused: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count)
        parts = [f"{self.rows} rows, {self.kept} examples"]
        if left_out:
            parts.append(f"left out: {left_out}")
        if self.cut:
            parts.append(f"cut at max_length: {self.cut}")
        if self.unused:
            parts.append(explain_unused(self.unused))
        return f"{self.source}: {'; '.join(parts)}"


def explain_unused(unused: Mapping[str, int]) -> str:
    """`unused: id (12 rows)`, the most frequent first."""
    return "unused: " + ", ".join(
        f"{name} ({count} rows)" for name, count in sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    )


class Cleaner:
    """Goes over rows and their sequences, leaves out what the settings say, and counts it.

    Cleaners of several sources may share what they have `seen`: then a duplicate of another source's row is one too.
    """

    def __init__(self, settings: CleaningConfig, *, max_length: int, overlong: str, seen: set[bytes] | None = None):
        self._settings, self._max_length, self._overlong = settings, max_length, overlong
        self.rows, self.cut = 0, 0
        self.dropped: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self._seen = set() if seen is None else seen

    def records(self, rows: Iterable[Row], kind: DataType | None, names: ColumnsConfig) -> Iterator[tuple[Row, Record]]:
        """(row, record) of all that is to be used; `kind` None: what the first row is.

        Raises DataError for a row that is wrong, or empty where `cleaning.empty` is off.
        """
        for row in rows:
            self.rows += 1
            kind = kind or detect(row, names)
            for record in self.wanted(row, kind, names):
                yield row, record

    def wanted(self, row: Row, kind: DataType, names: ColumnsConfig) -> list[Record]:
        """The records of one row that are to be used. Raises as `records` does."""
        try:
            records = parse(row, kind, names, self.unused)
        except EmptyRowError:
            if not self._settings.empty:
                raise
            self.dropped[EMPTY] += 1
            return []
        return [record for record in records if self._is_wanted(record)]

    def _is_wanted(self, record: Record) -> bool:
        if self._settings.identical and isinstance(record, PreferenceRow) and record.chosen == record.rejected:
            self.dropped[IDENTICAL] += 1
            return False
        if self._settings.duplicates:
            # A digest, not the text: a set of texts would hold the whole dataset once more.
            key = hashlib.blake2b(repr(record).encode(), digest_size=16).digest()
            if key in self._seen:
                self.dropped[DUPLICATE] += 1
                return False
            self._seen.add(key)
        return True

    def is_answered(self, *examples: TokenizedExample) -> bool:
        """Whether each sequence has enough learned tokens, not counting EOS; a pair is kept or left out as a whole."""
        if all(sum(e.learned) - 1 >= self._settings.min_response_tokens for e in examples):
            return True
        self.dropped[SHORT] += 1
        return False

    def fitting(self, *examples: TokenizedExample, where: str) -> tuple[TokenizedExample, ...] | None:
        """The sequences, truncated where that is asked for; None if one of them is too long (a pair goes as a whole).

        Raises DataError where `overlong` is error.
        """
        longest = max(len(e.token_ids) for e in examples)
        if longest <= self._max_length:
            return examples
        if self._overlong == "error":
            raise DataError(
                f"{where}: {longest} tokens, the limit is {self._max_length}; raise data.max_length, shorten the row, "
                "or set data.overlong to drop or truncate"
            )
        shortened = tuple(
            TokenizedExample(e.token_ids[: self._max_length], e.learned[: self._max_length]) for e in examples
        )
        if self._overlong == "drop" or not all(any(e.learned) for e in shortened):
            self.dropped[LONG] += 1
            return None
        self.cut += 1
        return shortened

    def report(self, source: str, kept: int, read: str) -> CleaningReport:
        return CleaningReport(source, self.rows, kept, dict(self.dropped), self.cut, read, dict(self.unused))
