"""A step computed again in one process, to find what in it is not finite: columns, forward passes, losses, gradients.

Each micro-batch is computed alone first, as the rank had it, so that its own gradient can be seen; then all of an
optimiser step together, so that the next one meets the weights that it met in the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Share
from rlhf_ray.roles.shared_prompts import Line, MicroBatch
from rlhf_ray.roles.training import TrainingRole


@dataclass(frozen=True)
class NotFinite:
    """Numbers of one row that are not finite."""

    what: str  # a column of the batch, or `logp` and `ratio`, which are computed anew
    row: int
    tokens: tuple[int, ...]  # places in the row, prompt included; none where it is a number of the whole row


@dataclass(frozen=True)
class Pass:
    """One micro-batch's forward and backward pass."""

    optimiser_step: int
    rank: int
    microbatch: int
    rows: tuple[int, ...]
    loss: float
    grad_norm: float
    bad_rows: tuple[int, ...]  # whose loss or gradient is not finite, each row (or line of rows) computed alone

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Examined:
    """What was found. `grad_norms`: of each optimiser step, before clipping."""

    numbers: tuple[NotFinite, ...]
    passes: tuple[Pass, ...]
    grad_norms: tuple[float, ...]

    @property
    def finite(self) -> bool:
        norms = all(math.isfinite(norm) for norm in self.grad_norms)
        return not self.numbers and norms and all(one.finite for one in self.passes)


def not_finite(what: str, column: Tensor, mask_BT: Tensor) -> list[NotFinite]:
    """Of a column [B, T], where the mask is set, or [B]."""
    bad = ~torch.isfinite(column)
    if column.dim() == 1:
        return [NotFinite(what, row, ()) for row in bad.nonzero()[:, 0].tolist()]
    bad_BT = bad & mask_BT
    rows = bad_BT.any(1).nonzero()[:, 0].tolist()
    return [NotFinite(what, row, tuple(bad_BT[row].nonzero()[:, 0].tolist())) for row in rows]


def columns_of(batch: Batch) -> list[NotFinite]:
    """What is not finite in what the step was given."""
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    return [
        found for name, column in columns.items() if isinstance(column, Tensor) and column.is_floating_point()
        for found in not_finite(name, column, batch.response_mask)
    ]  # fmt: skip


def forward_of(batch: Batch, logp_BT: Tensor) -> list[NotFinite]:
    """What is not finite in log-probabilities that were computed anew, and in their ratios to the old ones."""
    old_BT = batch.logp_gen if batch.logp_old is None else batch.logp_old
    found = {"logp": logp_BT, "ratio": torch.exp(logp_BT - old_BT)}
    return [one for name, column in found.items() for one in not_finite(name, column, batch.response_mask)]


def examine(
    role: TrainingRole, batch: Batch, loss: Callable[..., tuple[Tensor, Mapping[str, Tensor]]], lr: float, ranks: int
) -> tuple[tuple[Pass, ...], tuple[float, ...]]:
    """All passes of the step, which `role` takes, and the gradient norm of each optimiser step.

    Args:
        role: in this process alone, with the weights that the step began with; it has others afterwards.
        loss: of a micro-batch, as `TrainingRole.begin_step` takes it.
        ranks: how many the run had: they decide which rows share a micro-batch.
    """
    passes: list[Pass] = []
    norms: list[float] = []
    division = replace(role.division, ranks=ranks)
    for epoch in range(role.config.epochs):
        compute = partial(loss, first_epoch=epoch == 0)
        for shares in division.shares(batch.rows):
            passes += _alone(role.engine, batch, shares, compute, len(norms))
            norm, counted = role.optimiser_step(batch, _together(shares), compute, lr)
            norms.append(norm)
            if role.is_far(counted):
                return tuple(passes), tuple(norms)
    return tuple(passes), tuple(norms)


def _together(shares: Sequence[Share]) -> Share:
    """What all ranks compute of an optimiser step, for one to compute."""
    real = tuple(lines for share in shares for lines in share.microbatches[: share.real])
    return replace(shares[0], microbatches=real, real=len(real))


def _alone(
    engine: TorchEngine, batch: Batch, shares: Sequence[Share], compute: Callable[..., Any], optimiser_step: int
) -> Iterator[Pass]:
    for rank, share in enumerate(shares):
        for number, lines in enumerate(share.microbatches[: share.real]):
            loss, norm = _measured(engine, batch, lines, share, compute)
            bad: list[int] = []
            if not (math.isfinite(loss) and math.isfinite(norm)):
                for line in lines:
                    if not all(map(math.isfinite, _measured(engine, batch, (line,), share, compute))):
                        bad += line
            rows = tuple(row for line in lines for row in line)
            yield Pass(optimiser_step, rank, number, rows, loss, norm, tuple(bad))


def _measured(
    engine: TorchEngine, batch: Batch, lines: Sequence[Line], share: Share, compute: Callable[..., Any]
) -> tuple[float, float]:
    """(loss, gradient norm) of one pass; nothing is left of it."""
    loss, _ = compute(MicroBatch.of(batch, lines), share)
    engine.backward(loss, last=True)
    norm = engine.gradient_norm()
    engine.discard()
    return float(loss.detach()), norm
