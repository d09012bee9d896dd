"""How the ranks of a trainer divide a step: which rows each of them holds, and in what passes it computes them.

All of it is a pure function of the step's rows (their prompts and lengths). So the driver can send each rank its own
samples and nothing else, a second pass over the same rows meets the same neighbours, and the number of ranks changes
no optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from rlhf_ray.batch import Batch, Rows
from rlhf_ray.roles.microbatch import split_microbatches, split_minibatches, split_ranks
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
