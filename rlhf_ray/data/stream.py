"""In which order rows come: endless shuffled streams over one source, or over several by their weights.

A position alone decides, so that all a checkpoint keeps of a stream is an integer.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from rlhf_ray.errors import ConfigError

# Weights are kept exactly where their shares fit a cycle of so many positions, else to one part in so many.
LONGEST_CYCLE = 10_000
_AT_ONCE = 65_536  # digests that stand side by side as Python objects


@dataclass(frozen=True)
class Part:
    """`rows` rows in a line that come from one source; `weight`: of the source among the others (None: its rows)."""

    name: str
    rows: int
    weight: float | None = None


class Stream(Protocol):
    """Position 0, 1, 2, ... -> (epoch of the row's source, index of the row)."""

    def __getitem__(self, position: int) -> tuple[int, int]: ...

    def take(self, position: int, count: int) -> list[tuple[int, int]]:
        """The `count` entries from `position` on."""

    def epochs(self, position: int) -> list[float]:
        """How often each part has been gone through before `position`."""


# (rows that belong together, epoch) -> those of them that come in this epoch, in order; at least one.
Order = Callable[[range, int], Sequence[int]]


def stream_over(parts: Sequence[Part], seed: int, order: Order | None = None) -> Stream:
    """One stream over the rows of all parts, which lie one after the other.

    Parts without weights are one set of rows, and in an epoch each comes once, shuffled, or as `order` says. Raises
    ConfigError for a part without rows.
    """
    for part in parts:
        if part.rows < 1 and len(parts) > 1:
            raise ConfigError(f"data: the source {part.name} has no row to learn from; give it more, or remove it")
    if len(parts) == 1 or any(part.weight is None for part in parts):
        rows = sum(part.rows for part in parts)
        if order is not None:
            return OrderedStream(range(rows), order, parts=len(parts))
        return PromptStream(rows, seed, parts=len(parts))
    return MixedStream(parts, seed, order)


class PromptStream:
    """An endless shuffled stream: position 0, 1, 2, ... -> (epoch, example index).

    A pure function of (seed, position): its only state is the position, which the checkpoint keeps as an integer.
    Every epoch visits every example once, in an order of its own. `parts`: how many sources the examples come from.
    """

    def __init__(self, n_examples: int, seed: int | str, parts: int = 1):
        if n_examples < 1:
            raise ConfigError("data: a stream over 0 examples never yields a prompt; give it at least one")
        self.n_examples, self.seed, self.parts = n_examples, seed, parts
        # Of the stream, not of the module: many sources would push each other's orders out.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, n_examples, seed))

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"a stream has no position {position}: positions count from 0")
        epoch, place = divmod(position, self.n_examples)
        return epoch, int(self._order(epoch)[place])

    def take(self, position: int, count: int) -> list[tuple[int, int]]:
        return [self[p] for p in range(position, position + count)]

    def epochs(self, position: int) -> list[float]:
        return [position / self.n_examples] * self.parts


class OrderedStream:
    """An endless stream whose epochs an `order` names row by row, so that one may be longer than another."""

    def __init__(self, rows: range, order: Order, parts: int = 1):
        self.rows, self.parts = rows, parts
        self._order = functools.lru_cache(maxsize=2)(functools.partial(order, rows))
        self._starts = [0]  # the positions in which epochs begin, as far as anyone has asked

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = self._at(position)
        return epoch, self._order(epoch)[place]

    def take(self, position: int, count: int) -> list[tuple[int, int]]:
        return [self[p] for p in range(position, position + count)]

    def epochs(self, position: int) -> list[float]:
        epoch, place = self._at(position)
        return [epoch + place / len(self._order(epoch))] * self.parts

    def _at(self, position: int) -> tuple[int, int]:
        """(epoch, place in it)"""
        if position < 0:
            raise IndexError(f"a stream has no position {position}: positions count from 0")
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._order(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return epoch, position - self._starts[epoch]


class MixedStream:
    """Several sources by weight, each with shuffled epochs of its own: position -> (epoch of its source, index).

    A pure function of (seed, position). Before any position each source has had its share of the rows but for less
    than one row. A source's order does not depend on the others.
    """

    def __init__(self, parts: Sequence[Part], seed: int, order: Order | None = None):
        self.parts = tuple(parts)
        self._shares = shares_of(tuple(float(part.weight or 0) for part in parts))
        self._cycle = _cycle(self._shares)
        ends = list(itertools.accumulate(part.rows for part in parts))
        starts = [end - part.rows for end, part in zip(ends, parts, strict=True)]
        self._starts = starts if order is None else [0] * len(parts)  # an order names rows of the whole line
        self._streams: list[Stream] = [
            PromptStream(part.rows, f"{seed}/{part.name}") if order is None else OrderedStream(range(start, end), order)
            for part, start, end in zip(parts, starts, ends, strict=True)
        ]

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"a stream has no position {position}: positions count from 0")
        cycle, place = divmod(position, len(self._cycle))
        source, earlier = self._cycle[place]
        epoch, row = self._streams[source][cycle * self._shares[source] + earlier]
        return epoch, self._starts[source] + row

    def take(self, position: int, count: int) -> list[tuple[int, int]]:
        return [self[p] for p in range(position, position + count)]

    def epochs(self, position: int) -> list[float]:
        cycles, place = divmod(position, len(self._cycle))
        begun = [0] * len(self.parts)
        for source, _ in self._cycle[:place]:
            begun[source] += 1
        return [
            stream.epochs(cycles * share + more)[0]
            for share, more, stream in zip(self._shares, begun, self._streams, strict=True)
        ]


def described(parts: Sequence[Part]) -> str:
    """How several sources are mixed, for people."""
    weighed = all(part.weight is not None for part in parts)
    weights = [part.weight if weighed else part.rows for part in parts]
    pairs = zip(parts, weights, strict=True)
    shares = ", ".join(f"{part.name} {weight / sum(weights):.1%} ({part.rows} rows)" for part, weight in pairs)
    return f"sources: {shares}; " + ("drawn by weight" if weighed else "no weights, so each row comes once an epoch")


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """How many positions of a cycle each weight gets: (0.75, 0.25) -> (3, 1)."""
    exact = [Fraction(repr(weight)) for weight in weights]  # as written: 0.1 is a tenth
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [count // math.gcd(*whole) for count in whole]
    if sum(whole) <= LONGEST_CYCLE:
        return tuple(whole)
    return tuple(max(1, share) for share in apportion(LONGEST_CYCLE, whole))


def apportion(total: int, weights: Sequence[float], most: Sequence[int] | None = None) -> list[int]:
    """Whole numbers that add up to `total` (or to all of `most`) and are as near to the weights' shares as they can be.

    `most` bounds each of them. Of equal claims the first wins.
    """
    limits = list(most) if most is not None else [total] * len(weights)
    everything = sum(map(Fraction, weights)) or Fraction(1)
    wanted = [total * Fraction(weight) / everything for weight in weights]
    given = [min(limit, math.floor(share)) for limit, share in zip(limits, wanted, strict=True)]
    for _ in range(min(total, sum(limits)) - sum(given)):
        free = [i for i, limit in enumerate(limits) if given[i] < limit]
        given[max(free, key=lambda i: (wanted[i] - given[i], -i))] += 1
    return given


@functools.lru_cache(maxsize=16)
def _cycle(shares: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(source, how often it has come in this cycle) of each position of one cycle.

    The k-th row of a source is due in the positions in which its share passes from k to k + 1; of those that are due,
    the one that must come first is taken. So no source is ever a whole row before or behind its share (Baruah et al.,
    "Proportionate progress", 1996; with one machine, the earliest deadline is enough).
    """
    length, come = sum(shares), [0] * len(shares)
    order = []
    for position in range(length):
        due = [i for i, share in enumerate(shares) if come[i] < share and come[i] * length // share <= position]
        source = min(due, key=lambda i: (-(-(come[i] + 1) * length // shares[i]), i))
        order.append((source, come[source]))
        come[source] += 1
    return tuple(order)


def by_turns(names: Sequence[str]) -> list[int]:
    """Positions in `names`, one of each name in turn: what is cut off shows some of every source."""
    if len(set(names)) < 2:
        return list(range(len(names)))
    seen: dict[str, int] = {}
    turns = []
    for name in names:
        turns.append(seen.get(name, 0))
        seen[name] = turns[-1] + 1
    return sorted(range(len(names)), key=lambda i: (turns[i], i))


def _epoch_order(n_examples: int, seed: int | str, epoch: int) -> np.ndarray:
    # Sorting by a keyed hash is a uniform shuffle that no library version can change under a resumed run.
    ranks = np.empty((n_examples, 2), ">u8")
    for start in range(0, n_examples, _AT_ONCE):
        end = min(start + _AT_ONCE, n_examples)
        digests = b"".join(
            hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest() for index in range(start, end)
        )
        ranks[start:end] = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((ranks[:, 1], ranks[:, 0])).astype(np.int32)
