"""Who computes which rows, and in what order: minibatches, ranks, micro-batches.

Every decision is a pure function of the rows' ids and lengths. So all ranks agree without talking, a second pass
over the same batch meets the same rows side by side (and the same floating-point sums), and a run on three
ranks takes the same optimiser steps as a run on one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """This rank's micro-batches, as places in a list of items; dummies at the end keep it in step with the others."""

    parts: tuple[tuple[int, ...], ...]
    real: int
    padding: float  # share of padding in what all ranks compute, dummies included


def plan_items(rows: Sequence[Sequence[int]], max_tokens: int, rank: int = 0, world_size: int = 1) -> Plan:
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
    return Plan(tuple(map(tuple, parts_of_all[rank])), len(parts[rank]), padding)


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
