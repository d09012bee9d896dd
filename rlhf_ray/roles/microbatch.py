"""Who computes which rows, and in what order: minibatches, ranks, micro-batches.

Every decision is a pure function of the rows' ids and lengths. So all ranks agree without talking, a second pass
over the same batch meets the same rows side by side (and the same floating-point sums), and a run on three
ranks takes the same optimiser steps as a run on one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence


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
    loads = [0] * world_size
    for row in sorted(rows, key=lambda r: (-int(lengths[r]), r)):
        lightest = loads.index(min(loads))
        shares[lightest].append(row)
        loads[lightest] += int(lengths[row])
    return shares


def split_microbatches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of each micro-batch: sorted by length (little padding), at most `max_tokens` padded tokens each.

    A single row longer than `max_tokens` gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda r: (-int(lengths[r]), r)):
        # Longest first: the first row of a micro-batch is its padded width.
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
