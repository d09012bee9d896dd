"""Cleaning: what is left out of a dataset, counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rlhf_ray.config.data import CleaningConfig, ColumnsConfig, DataType
from rlhf_ray.data.columns import NamedColumns
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.near_duplicates import NearDuplicates
from rlhf_ray.data.overlap import HeldOutPrompts
from rlhf_ray.data.parts import parts_of, record_key
from rlhf_ray.data.privacy import PersonalData, explain_personal
from rlhf_ray.data.rows import Row
from rlhf_ray.data.types import PreferenceRow, Record, detect, parse, prompt_of
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

# Reasons, as reports and logs name them.
EMPTY, DUPLICATE, NEAR, IDENTICAL = "empty", "duplicate", "near duplicate", "identical answers"
SHORT, LONG, TIED, UNWANTED = "answer too short", "too long", "equal scores", "labelled as bad"


@dataclass(frozen=True)
class CleaningReport:
    """Of `rows` rows of `source`, `kept` examples were made; `dropped` counts the others by reason, `cut` those cut.

    `read` is the fingerprint of the rows as they stand there.
    `unused` counts the rows that have a column, or a key of their messages, which nothing reads. `overlap` counts
    examples whose prompt the run is also judged on and that were kept, `personal` the personal data by kind.
    `absent` holds, by role, the columns that the settings name and no row has.
    """

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    cut: int = 0
    read: str = ""
    unused: Mapping[str, int] = field(default_factory=dict)
    overlap: Mapping[str, int] = field(default_factory=dict)
    personal: Mapping[str, int] = field(default_factory=dict)
    masked: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left_out = ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count)
        parts = [f"{self.rows} rows, {self.kept} examples"]
        if left_out:
            parts.append(f"left out: {left_out}")
        if self.cut:
            parts.append(f"cut at max_length: {self.cut}")
        if self.unused:
            parts.append(explain_unused(self.unused))
        if self.absent:
            parts.append(explain_absent(self.absent))
        if self.overlap:
            asked = ", ".join(f"{count} {place}" for place, count in self.overlap.items())
            parts.append(f"prompts {asked} (cleaning.overlap=drop leaves such rows out)")
        if self.personal:
            what = "masked" if self.masked else "cleaning.privacy=mask hides it"
            parts.append(f"personal data: {explain_personal(self.personal)} ({what})")
        return f"{self.source}: {'; '.join(parts)}"


def fingerprints_of(reports: Iterable[CleaningReport]) -> dict[str, str]:
    """Of the rows that were read, by source, in the order of reading."""
    found: dict[str, str] = {}
    for report in reports:
        name, number = report.source, 1
        while name in found:  # another split of it
            number += 1
            name = f"{report.source}, reading {number}"
        found[name] = report.read
    return found


def explain_unused(unused: Mapping[str, int]) -> str:
    """`unused: id (12 rows)`, the most frequent first."""
    return "unused: " + ", ".join(
        f"{name} ({count} rows)" for name, count in sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    )


def explain_absent(absent: Mapping[str, str]) -> str:
    """`no row has 'rules' (columns.system)`."""
    return "no row has " + ", ".join(f"{name!r} (columns.{role})" for role, name in absent.items())


class Earlier:
    """Rows that have been seen before: those that say exactly the same, and, above a likeness, nearly the same."""

    def __init__(self, near_duplicates: float | None):
        self.exact: set[bytes] = set()
        self.near = None if near_duplicates is None else NearDuplicates[str](near_duplicates)


class Cleaner:
    """Goes over rows and their sequences, leaves out what the settings say, and counts it.

    Cleaners of several sources may share what is `earlier`: then a duplicate of another source's row is one too.
    """

    def __init__(
        self, settings: CleaningConfig, *, max_length: int, overlong: str, earlier: Earlier | None = None,
        held_out: HeldOutPrompts | None = None,
    ):  # fmt: skip
        self._settings, self._max_length, self._overlong, self._held_out = settings, max_length, overlong, held_out
        self.rows, self.cut = 0, 0
        self.dropped: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.overlap: Counter[str] = Counter()
        self.personal = PersonalData(settings.privacy)
        self.named: NamedColumns | None = None
        self._earlier = Earlier(settings.near_duplicates) if earlier is None else earlier

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
        self.named = self.named or NamedColumns(names)
        self.named.see(row)
        row = self.personal.seen(row)
        try:
            records = parse(row, kind, names, self.unused)
        except EmptyRowError:
            if not self._settings.empty:
                raise
            self.dropped[EMPTY] += 1
            return []
        return [record for record in records if self._is_wanted(record, row.where)]

    def _is_wanted(self, record: Record, where: str) -> bool:
        if self._settings.identical and isinstance(record, PreferenceRow) and record.chosen == record.rejected:
            self.dropped[IDENTICAL] += 1
            return False
        if self._settings.duplicates:
            key = record_key(record)
            if key in self._earlier.exact:
                self.dropped[DUPLICATE] += 1
                return False
            self._earlier.exact.add(key)
        if self._earlier.near is not None and self._earlier.near.find_or_add(where, parts_of(record)) is not None:
            self.dropped[NEAR] += 1
            return False
        return not self._is_asked_elsewhere(record)

    def _is_asked_elsewhere(self, record: Record) -> bool:
        """Whether a record is left out because the run is judged on its prompt."""
        place = None if self._held_out is None else self._held_out.find(prompt_of(record))
        if place is None:
            return False
        drops = self._settings.overlap == "drop"
        (self.dropped if drops else self.overlap)[f"{place}"] += 1
        return drops

    def is_same(self, chosen: TokenizedExample, rejected: TokenizedExample) -> bool:
        """Whether the answers of a pair, which differ in the row, are the same to who reads them: a template trims
        them, or both are cut before they differ."""
        if not self._settings.identical or chosen.token_ids != rejected.token_ids:
            return False
        self.dropped[IDENTICAL] += 1
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
        return CleaningReport(
            source,
            self.rows,
            kept,
            dict(self.dropped),
            self.cut,
            read,
            dict(self.unused),
            dict(self.overlap),
            dict(self.personal.counts),
            self._settings.privacy == "mask",
            {} if self.named is None else self.named.absent,
        )
