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


@dataclass(frozen=True)
class RankBatch(Batch):
    """What one of several ranks is given of a step: its own rows, then the empty ones that its dummies are made of."""

    shares: tuple[Share, ...] = ()  # one for each optimiser step
    own: int = 0  # rows that are the step's


@dataclass(frozen=True)
class RankPart:
    """What one rank computes of a step."""

    rows: tuple[int, ...]  # of the step, in order
    dummies: tuple[int, ...]  # tokens of each of the empty rows that stand behind them
    shares: tuple[Share, ...]  # by places in `rows`, then in `dummies`


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
        minibatches = split_minibatches(step.prompt_id, self.minibatches, self.seed)
        return [self._of_ranks(step, rows) for rows in minibatches]

    def _of_ranks(self, step: Rows, rows: list[int]) -> list[Share]:
        lines, sizes = plan_lines(step, rows, self.max_tokens, self.sharing, self.ranks)
        parts = [
            [tuple(lines[i] for i in part) for part in split_microbatches(share, sizes, self.max_tokens)]
            for share in split_ranks(range(len(lines)), sizes, self.ranks)
        ]
        most, shortest = max(map(len, parts)), min(rows, key=step.lengths.__getitem__)
        written = [step.response_lengths[row] for row in rows]
        return [
            Share((*own, *[((shortest,),)] * (most - len(own))), len(own), sum(written), sum(map(bool, written)))
            for own in parts
        ]

    def parts(self, step: Rows) -> list[RankPart]:
        """What each rank computes. No rank needs another's rows: its dummies are rows of zeros, as long as the row
        that a whole batch would repeat."""
        shares = self.shares(step)
        return [_part(step, [ranks[rank] for ranks in shares]) for rank in range(self.ranks)]


def _part(step: Rows, shares: list[Share]) -> RankPart:
    real = [share.microbatches[: share.real] for share in shares]
    rows = sorted({row for passes in real for lines in passes for line in lines for row in line})
    place = {row: index for index, row in enumerate(rows)}
    dummies: list[int] = []
    own = []
    for share, whole in zip(shares, real, strict=True):
        passes = [tuple(tuple(place[row] for row in line) for line in lines) for lines in whole]
        repeated = share.microbatches[share.real :]
        if repeated:
            passes += [((len(rows) + len(dummies),),)] * len(repeated)
            dummies.append(step.lengths[repeated[0][0][0]])
        own.append(replace(share, microbatches=tuple(passes)))
    return RankPart(tuple(rows), tuple(dummies), tuple(own))


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
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        groups.setdefault(int(prompt), []).append(row)
    order = sorted(groups)
    if count > 1:
        random.Random(f"{seed}:{order[0]}").shuffle(order)
    parts = min(count, len(order))
    starts = [i * len(order) // parts for i in range(parts + 1)]
    return [
        [row for prompt in order[start:end] for row in groups[prompt]] for start, end in itertools.pairwise(starts)
    ]


def split_ranks(rows: Sequence[int], lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Rows of each rank, balanced by tokens: the longest remaining row goes to the lightest rank."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]  # a heap; of equal loads the first rank's comes first
    for row in _longest_first(rows, lengths):
        load, lightest = loads[0]
        shares[lightest].append(row)
        heapq.heapreplace(loads, (load + int(lengths[row]), lightest))
    return shares


def split_microbatches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of each micro-batch: sorted by length (little padding), at most `max_tokens` padded tokens each.

    A single row longer than `max_tokens` gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    for row in _longest_first(rows, lengths):
        # Longest first: the first row of a micro-batch is its padded width.
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Of equal lengths the first row comes first: sorting keeps their order, also in reverse."""
    return sorted(sorted(rows), key=lengths.__getitem__, reverse=True)
