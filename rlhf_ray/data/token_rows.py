"""Long lists whose items are made when they are asked for: rows of token ids, and what belongs to each row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np

Item = TypeVar("Item")
Tokens = Sequence[int]


@dataclass(frozen=True)
class Bounds:
    """Of rows of token ids: the most tokens of a row, and the highest token."""

    longest: int
    highest: int

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> Bounds:
        """Without making the rows, where they know it. Raises ValueError for no rows."""
        if isinstance(rows, TokenRows):
            return rows.bounds()
        if isinstance(rows, Joined):
            parts = [cls.of(part) for part in rows.parts if len(part)]
            return cls(max(part.longest for part in parts), max(part.highest for part in parts))
        return cls(max(map(len, rows)), max(map(max, rows)))


class Made(Sequence[Item]):
    """`make(index)` of each index, anew each time."""

    def __init__(self, make: Callable[[int], Item], indices: range) -> None:
        self.make, self.indices = make, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Made[Item]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(self.make, self.indices[index])
        return self.make(self.indices[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, self.indices)


class TokenRows(Made[tuple[int, ...]]):
    """Rows of one flat array of token ids: row i ends at `ends[i]`."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray, highest: np.ndarray, indices: range | None = None) -> None:
        self.flat, self.ends, self.highest = flat, ends, highest
        super().__init__(self._row, range(len(ends)) if indices is None else indices)

    def _row(self, index: int) -> tuple[int, ...]:
        start = int(self.ends[index - 1]) if index else 0
        return tuple(self.flat[start : int(self.ends[index])].tolist())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TokenRows(self.flat, self.ends, self.highest, self.indices[index])
        return super().__getitem__(index)

    def bounds(self) -> Bounds:
        own = np.arange(self.indices.start, self.indices.stop, self.indices.step)
        return Bounds(int(np.diff(self.ends, prepend=0)[own].max()), int(self.highest[own].max()))


class Joined(Sequence[Item]):
    """Lists one behind the other, none copied."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        if isinstance(place, range):
            return Made(self.__getitem__, place)
        number = bisect_right(self._ends, place)
        return self.parts[number][place - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Item]:
        for part in self.parts:
            yield from part


def mapped(rows: Sequence[Item], change: Callable[[Item], Item]) -> Sequence[Item]:
    """`change` of each item: at once, or of a long list when it is asked for."""
    if isinstance(rows, Made | Joined):
        return Made(lambda index: change(rows[index]), range(len(rows)))
    return tuple(map(change, rows))


def joined_rows(lists: Sequence[Sequence[Item]]) -> Sequence[Item]:
    """All items of all lists: a tuple, unless one of them is long."""
    if any(isinstance(rows, Made | Joined) for rows in lists):
        return Joined(lists)
    return tuple(item for rows in lists for item in rows)
