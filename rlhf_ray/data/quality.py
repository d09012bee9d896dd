"""What `validate-data` says of rows beyond whether they are right: near duplicates, prompts that a test asks too,
personal data, and whether the better answers are the longer ones."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.length_balance import LengthBalance, length_balance
from rlhf_ray.data.near_duplicates import NearDuplicates
from rlhf_ray.data.overlap import HeldOutPrompts, Place
from rlhf_ray.data.parts import parts_of, written
from rlhf_ray.data.privacy import explain_personal, masked_row, shape
from rlhf_ray.data.rows import Row, placed
from rlhf_ray.data.types import PreferenceRow, RankedRow, Record, prompt_of
from rlhf_ray.data.words import words

SHOWN = 5  # places named of each kind; the counts are of all


@dataclass(frozen=True)
class QualityWishes:
    """What is looked for beside the lengths of pairs, which cost nothing."""

    near_duplicates: float | None = None
    against: tuple[str, ...] = ()
    privacy: bool = False


NOTHING_MORE = QualityWishes()


@dataclass(frozen=True)
class QualityReport:
    """Counts, and for each the first places (`file:line`), with what is there. None: nobody asked."""

    near_duplicates: int | None
    near_places: tuple[tuple[str, str], ...]
    overlap: dict[str, int] | None
    overlap_places: tuple[tuple[str, str, bool], ...]  # the last: exactly, not nearly
    personal: dict[str, int] | None
    personal_places: tuple[tuple[str, str, str], ...]
    lengths: LengthBalance | None

    def lines(self) -> Iterator[str]:
        if self.near_duplicates is not None:
            yield f"near duplicates of an earlier row: {self.near_duplicates}"
            near = (f"{where} says nearly what {other} says" for where, other in self.near_places)
            yield from _places(self.near_duplicates, near)
        if self.overlap is not None:
            counts = ", ".join(f"{count} {place}" for place, count in self.overlap.items()) or "none"
            yield f"prompts that are asked there too: {counts}"
            asked = (
                f"{where} asks {'' if exactly else 'nearly '}what {other} asks"
                for where, other, exactly in self.overlap_places
            )
            yield from _places(sum(self.overlap.values()), asked)
        if self.personal is not None:
            yield f"personal data: {explain_personal(self.personal) or 'none found'}"
            found = (f"{where}: {kind} {hidden}" for where, kind, hidden in self.personal_places)
            yield from _places(sum(self.personal.values()), found)
        if self.lengths is not None:
            yield str(self.lengths)
            if self.lengths.is_strong:
                yield f"warning: {self.lengths.advice}"


class QualityWatch:
    """Sees each good row once, in order."""

    def __init__(self, wishes: QualityWishes, data: DatasetConfig):
        """Raises DataError where a file to compare with cannot be opened, ConfigError for a missing package."""
        self._wishes = wishes
        self._near = None if wishes.near_duplicates is None else NearDuplicates[str](wishes.near_duplicates)
        self._held_out: HeldOutPrompts | None = None
        if wishes.against:
            self._held_out = HeldOutPrompts(wishes.near_duplicates)
            for source in wishes.against:
                self._held_out.add_rows(source, split=data.eval_split, limit=None, kind=None, names=data.columns)
        self._nears: list[tuple[str, str]] = []
        self._overlap: list[tuple[str, Place]] = []
        self._personal: list[tuple[str, str, str]] = []
        self._lengths: list[tuple[int, int]] = []

    def see(self, row: Row, records: Sequence[Record]) -> None:
        """`records`: those of the row that training uses, so exact duplicates are not counted once more.

        Raises DataError that names the row if it is nested too deeply to be looked through.
        """
        if self._wishes.privacy:
            with placed(row.where):
                masked_row(row.fields, lambda kind, found: self._personal.append((row.where, kind, shape(found))))
        for record in records:
            if self._near is not None and (other := self._near.find_or_add(row.where, parts_of(record))) is not None:
                self._nears.append((row.where, other))
            if self._held_out is not None and (place := self._held_out.find(prompt_of(record))) is not None:
                self._overlap.append((row.where, place))
            self._lengths += _lengths(record)

    def report(self) -> QualityReport:
        wishes = self._wishes
        return QualityReport(
            len(self._nears) if self._near is not None else None,
            tuple(self._nears[:SHOWN]),
            dict(Counter(str(place) for _, place in self._overlap)) if wishes.against else None,
            tuple((where, place.where, place.exactly) for where, place in self._overlap[:SHOWN]),
            dict(Counter(kind for _, kind, _ in self._personal)) if wishes.privacy else None,
            tuple(self._personal[:SHOWN]),
            length_balance(self._lengths, "words"),
        )


def _lengths(record: Record) -> Iterator[tuple[int, int]]:
    """(better, worse) in words, of each pair that a record makes."""
    if isinstance(record, PreferenceRow):
        yield len(words(written(record.chosen))), len(words(written(record.rejected)))
    elif isinstance(record, RankedRow):
        sizes = [len(words(written(answer))) for answer in record.completions]
        for better, worse in itertools.combinations(range(len(sizes)), 2):
            if record.scores is None or record.scores[better] != record.scores[worse]:
                yield sizes[better], sizes[worse]


def _places(count: int, places: Iterator[str]) -> Iterator[str]:
    yield from (f"  {place}" for place in places)
    if count > SHOWN:
        yield f"  and {count - SHOWN} more"
