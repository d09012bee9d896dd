"""Who computes which rows, and in what order: minibatches, ranks, micro-batches.

All of it is a pure function of the rows (their prompts and lengths). So the driver can send each rank its own samples
and nothing else, a second pass over the same rows meets the same neighbours (and the same floating-point sums), and the
number of ranks changes no optimiser step.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf_ray.roles.batch import Batch, Rows
from rlhf_ray.roles.shared_prompts import Line, MicroBatch, PromptSharing, plan_lines


@dataclass(frozen=True)
class Share:
    """One rank's part of one optimiser step.

    All ranks hold the same number of micro-batches: a rank that has run out repeats a row with an empty
    response mask, for every forward and backward pass is a collective.
    """

    microbatches: tuple[tuple[Line, ...], ...]
    real: int  # how many of them are not dummies
    total_tokens: int  # response tokens of the whole minibatch, over all ranks
    total_sequences: int

    def batches(self, batch: Batch) -> Iterator[MicroBatch]:
        for index, lines in enumerate(self.microbatches):
            micro = MicroBatch.of(batch, lines)
            yield micro if index < self.real else micro.replace(response_mask=torch.zeros_like(micro.response_mask))


@dataclass(frozen=True, eq=False)
class Passes:
    """A `Share` as columns of numbers, made and sent faster than its thousands of tuples."""

    rows: np.ndarray  # the rank's own, in the order of its passes
    lines: np.ndarray  # how many of them stand in each line of the model's input
    microbatches: np.ndarray  # how many of these lines make up each micro-batch, without dummies
    dummies: int
    dummy: int  # the row that dummies repeat
    total_tokens: int
    total_sequences: int

    def share(self) -> Share:
        rows, lines = iter(self.rows.tolist()), iter(self.lines.tolist())
        real = [
            tuple(tuple(itertools.islice(rows, line)) for line in itertools.islice(lines, count))
            for count in self.microbatches.tolist()
        ]
        return Share((*real, *[((self.dummy,),)] * self.dummies), len(real), self.total_tokens, self.total_sequences)


@dataclass(frozen=True)
class RankBatch(Batch):
    """What one of several ranks is given of a step: its own rows, then the empty ones that its dummies are made of."""

    shares: tuple[Share, ...] = ()  # one for each optimiser step
    own: int = 0  # rows that are the step's


@dataclass(frozen=True, eq=False)
class RankPart:
    """What one rank computes of a step."""

    rows: np.ndarray  # of the step, in order
    dummies: tuple[int, ...] = ()  # tokens of each of the empty rows that stand behind them
    passes: tuple[Passes, ...] = ()  # of each optimiser step, by places in `rows`, then in `dummies`


@dataclass(frozen=True)
class Division:
    """The rule. `max_tokens`: padded tokens of a micro-batch. `sharing`: which answers share their prompt's tokens."""

    minibatches: int
    max_tokens: int
    seed: int
    ranks: int = 1
    sharing: PromptSharing | None = None

    def shares(self, step: Rows) -> list[list[Share]]:
        """For each minibatch the share of each rank, by rows of the step."""
        return [[passes.share() for passes in ranks] for ranks in self._passes(step)]

    def parts(self, step: Rows) -> list[RankPart]:
        """What each rank computes. No rank needs another's rows: its dummies are rows of zeros, as long as the row
        that a whole batch would repeat."""
        return [_part(step, own) for own in zip(*self._passes(step), strict=True)]

    def pieces(self, step: Rows, most: int) -> list[list[RankPart]]:
        """The same in at most so many pieces, each a run of micro-batches of every rank: what a rank computes of each.
        The micro-batches are those of the whole step, however many pieces there are. For one minibatch."""
        (ranks,) = self._passes(step)
        count = len(ranks[0].microbatches) + ranks[0].dummies
        cuts = [count * i // min(most, count) for i in range(min(most, count) + 1)]
        return [
            [_part(step, [_run(passes, start, end)]) for passes in ranks]
            for start, end in zip(cuts, cuts[1:], strict=False)
        ]

    def _passes(self, step: Rows) -> list[list[Passes]]:
        """For each minibatch those of each rank."""
        return [self._of_ranks(step, rows) for rows in _minibatches(step.prompt_id, self.minibatches, self.seed)]

    def _of_ranks(self, step: Rows, rows: np.ndarray) -> list[Passes]:
        shortest, written = rows[step.lengths[rows].argmin()], step.response_lengths[rows]
        if self.sharing is None:  # every row is a line
            in_lines, lines = np.sort(rows), np.ones(len(rows), np.int64)
            sizes = step.lengths[in_lines]
        else:
            planned, sizes = plan_lines(step, rows, self.max_tokens, self.sharing, self.ranks)
            in_lines, sizes = np.fromiter(itertools.chain.from_iterable(planned), np.int64), np.asarray(sizes)
            lines = np.fromiter(map(len, planned), np.int64)
        first = np.cumsum(lines) - lines
        # A rank's lines come longest first, which is the order of its passes.
        shares = [np.asarray(share, np.int64) for share in split_ranks(np.arange(len(lines)), sizes, self.ranks)]
        parts = [_pass_sizes(sizes[share], self.max_tokens) for share in shares]
        most = max(map(len, parts))
        return [
            Passes(
                in_lines[_side_by_side(first[share], lines[share])], lines[share], np.asarray(part, np.int64),
                most - len(part), int(shortest), int(written.sum()), int((written > 0).sum()),
            )
            for share, part in zip(shares, parts, strict=True)
        ]  # fmt: skip


def _run(passes: Passes, start: int, end: int) -> Passes:
    """Some of its micro-batches, side by side."""
    lines = np.concatenate([[0], np.cumsum(passes.microbatches)])
    rows = np.concatenate([[0], np.cumsum(passes.lines)])
    real = len(passes.microbatches)
    first, last = lines[min(start, real)], lines[min(end, real)]
    return replace(
        passes, rows=passes.rows[rows[first] : rows[last]], lines=passes.lines[first:last],
        microbatches=passes.microbatches[start:end], dummies=end - max(start, min(end, real)),
    )  # fmt: skip


def _part(step: Rows, own: Sequence[Passes]) -> RankPart:
    rows = np.sort(np.concatenate([passes.rows for passes in own]))
    dummies: list[int] = []
    found = []
    for passes in own:
        found.append(
            replace(passes, rows=np.searchsorted(rows, passes.rows).astype(np.int32), dummy=len(rows) + len(dummies))
        )
        if passes.dummies:
            dummies.append(int(step.lengths[passes.dummy]))
    return RankPart(rows, tuple(dummies), tuple(found))


def _side_by_side(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, ... of each run, so many of each, one run behind the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True)
class Microbatches:
    """This rank's micro-batches, as places in a list of items; dummies at the end keep it in step with the others."""

    parts: tuple[tuple[int, ...], ...]
    real: int
    padding: float  # share of padding in what all ranks compute, dummies included


def split_items(rows: Sequence[Sequence[int]], max_tokens: int, rank: int = 0, world_size: int = 1) -> Microbatches:
    """Micro-batches of items of about the same length, balanced over the ranks; every rank gets equally many.

    Args:
        rows: of each item, the tokens of each sequence that it makes.
        max_tokens: padded tokens of a micro-batch.
    """
    costs = [len(lengths) * max(lengths) for lengths in rows]
    ranks = split_ranks(range(len(rows)), costs, world_size)
    parts = [split_microbatches(own, costs, max_tokens) for own in ranks]
    shortest = min(range(len(rows)), key=lambda place: costs[place])
    longest = max(map(len, parts))
    parts_of_all = [[*own, *[[shortest]] * (longest - len(own))] for own in parts]
    # The first item of a micro-batch is its longest.
    computed = sum(len(places) * costs[places[0]] for own in parts_of_all for places in own)
    padding = 1 - sum(map(sum, rows)) / computed
    return Microbatches(tuple(map(tuple, parts_of_all[rank])), len(parts[rank]), padding)


def split_minibatches(prompt_ids: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Rows of each minibatch: whole groups, shuffled, the same number of groups in each or one more.

    Args:
        prompt_ids: [B] group of each row.
        count: number of minibatches; fewer where there are fewer groups, for some may have been dropped.
    """
    return [rows.tolist() for rows in _minibatches(np.asarray(prompt_ids, np.int64), count, seed)]


def _minibatches(prompt_ids: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    groups, group_B, sizes = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    order = list(range(len(groups)))
    if count > 1:
        random.Random(f"{seed}:{groups[0]}").shuffle(order)
    turn = np.empty(len(groups), np.int64)
    turn[order] = np.arange(len(groups))
    rows = np.argsort(turn[group_B], kind="stable")
    parts, ends = min(count, len(order)), np.cumsum(sizes[order])
    return np.split(rows, [ends[i * len(order) // parts - 1] for i in range(1, parts)])


def split_ranks(rows: Sequence[int], lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Rows of each rank, balanced by tokens: the longest remaining row goes to the lightest rank."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    # A heap of load * world_size + rank: of equal loads the first rank's comes first.
    loads = list(range(world_size))
    order = _longest_first(rows, lengths)
    for row, more in zip(order.tolist(), (np.asarray(lengths)[order] * world_size).tolist(), strict=True):
        lightest = loads[0]
        shares[lightest % world_size].append(row)
        heapq.heapreplace(loads, lightest + more)
    return shares


def split_microbatches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of each micro-batch: sorted by length (little padding), at most `max_tokens` padded tokens each.

    A single row longer than `max_tokens` gets a micro-batch of its own.
    """
    order = _longest_first(rows, lengths)
    left = iter(order.tolist())
    return [list(itertools.islice(left, count)) for count in _pass_sizes(np.asarray(lengths)[order], max_tokens)]


def _pass_sizes(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """How many rows each micro-batch holds; `lengths` of the rows, longest first."""
    counts, start = [], 0
    while start < len(lengths):
        # The first row of a micro-batch is its padded width.
        counts.append(min(len(lengths) - start, max(1, max_tokens // int(lengths[start]))))
        start += counts[-1]
    return counts


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """Of equal lengths the first row comes first."""
    rows = np.sort(np.asarray(rows, np.int64))
    return rows[np.argsort(-np.asarray(lengths)[rows], kind="stable")]
