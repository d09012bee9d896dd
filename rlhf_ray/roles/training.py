"""What the learner and the critic share: walking a batch in optimiser steps, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import loss_totals
from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.batch import Batch
from rlhf_ray.config.schema import CriticConfig, LearnerConfig
from rlhf_ray.config.sections import TrainEngineConfig
from rlhf_ray.models.devices import peak_memory_gb
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.trainable import SkippedSteps
from rlhf_ray.roles.forward import over_microbatches
from rlhf_ray.roles.microbatch import split_microbatches, split_minibatches, split_ranks
from rlhf_ray.roles.sft_term import MicroLoss
from rlhf_ray.roles.shared_prompts import Line, MicroBatch, PromptSharing, plan_lines


@dataclass(frozen=True)
class Share:
    """This rank's part of one optimiser step.

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


@dataclass
class Totals:
    """Statistics that add up over micro-batches and ranks; names that end in `_max` take the maximum."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, stats: Mapping[str, Tensor | float]) -> None:
        self.values = combine_stats([self.values, {name: float(value) for name, value in stats.items()}])

    def over_ranks(self, engine: TrainEngine) -> dict[str, float]:
        """The totals of all ranks. Collective."""
        combined: dict[str, float] = {}
        for op, wanted in (("sum", False), ("max", True)):
            names = sorted(name for name in self.values if name.endswith("_max") is wanted)
            if names:
                values = torch.tensor([self.values[name] for name in names], dtype=torch.float64)
                combined.update(zip(names, engine.all_reduce(values, op).tolist(), strict=True))
        return combined


class Trainer:
    """Splits batches into optimiser steps and micro-batches; base of `Learner` and `Critic`."""

    def __init__(
        self,
        engine: TrainEngine,
        config: LearnerConfig | CriticConfig,
        *,
        seed: int,
        total_steps: int,
        first_step: int = 0,
        sharing: PromptSharing | None = None,
    ) -> None:
        """`first_step`: where the learning rate's schedule begins, for a policy that waits for its critic."""
        self.engine = engine
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.first_step = first_step
        self.sharing = sharing
        self._skipped = SkippedSteps(config.max_skipped_steps)
        # Without gradients a recurrent layer takes another kernel, whose sums end differently in the last bit.
        self._needs_grad_kernels = any(isinstance(layer, torch.nn.RNNBase) for layer in engine.module.modules())

    def shares(self, batch: Batch) -> list[Share]:
        """One `Share` for each minibatch. The same batch always gives the same shares."""
        prompts = batch.prompt_id.tolist()
        return [self._share(batch, rows) for rows in split_minibatches(prompts, self.config.minibatches, self.seed)]

    def _share(self, batch: Batch, rows: list[int]) -> Share:
        budget, ranks = self.config.tokens_per_microbatch, self.engine.world_size
        lines, sizes = plan_lines(batch, rows, budget, self.sharing, ranks)
        shares = split_ranks(range(len(lines)), sizes, ranks)
        parts = [split_microbatches(share, sizes, budget) for share in shares]
        mine = [tuple(lines[i] for i in part) for part in parts[self.engine.rank]]
        shortest = min(rows, key=batch.lengths.tolist().__getitem__)
        dummies = [((shortest,),)] * (max(len(part) for part in parts) - len(mine))
        tokens, sequences = loss_totals(batch.response_mask[rows]).tolist()
        return Share(
            microbatches=(*mine, *dummies), real=len(mine), total_tokens=tokens, total_sequences=sequences
        )

    def per_token(self, batch: Batch, compute: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Apply `compute` with the very micro-batches of `update`, so that both see bit-equal numbers. [B, T]"""
        out_BT = torch.zeros(batch.tokens.shape)
        with torch.set_grad_enabled(self._needs_grad_kernels):
            for share in self.shares(batch):
                out_BT += over_microbatches(batch, share.microbatches[: share.real], compute)
                for lines in share.microbatches[share.real :]:
                    compute(MicroBatch.of(batch, lines))  # keeps this rank in step with the others' collectives
        return self.engine.all_reduce(out_BT) if self.engine.world_size > 1 else out_BT

    def optimiser_step(
        self,
        batch: Batch,
        share: Share,
        loss_of: Callable[[MicroBatch, Share], tuple[Tensor, Mapping[str, Tensor]]],
        lr: float,
        more: Sequence[MicroLoss] = (),
    ) -> tuple[float, Totals]:
        """Accumulate `loss_of` over the micro-batches of a share and step once; (gradient norm, this rank's totals).

        `more` are forward passes over other rows, as many on every rank: their gradients are added before clipping.
        Raises DivergenceError where too many steps in a row had to be skipped.
        """
        totals = Totals()
        last = len(share.microbatches) + len(more) - 1
        for index, micro in enumerate(share.batches(batch)):
            loss, stats = loss_of(micro, share)
            self.engine.backward(loss, last=index == last)
            totals.add(stats)
            sizes = micro.line_tokens
            real = sum(sizes) if index < share.real else 0
            totals.add({"tokens_computed": len(sizes) * max(sizes), "tokens_wanted": real})
        for index, compute in enumerate(more, start=len(share.microbatches)):
            loss, stats = compute()
            self.engine.backward(loss, last=index == last)
            totals.add(stats)
        grad_norm = self.engine.step(lr)
        self._skipped.count(grad_norm)
        return grad_norm, totals

    def usage(self, totals: Mapping[str, float]) -> dict[str, float]:
        """How the device was used: the share of padding (dummy micro-batches too) in what was computed, and memory."""
        return {
            "perf/padding_frac": 1 - totals["tokens_wanted"] / max(1.0, totals["tokens_computed"]),
            "perf/peak_mem_gb": peak_memory_gb(self.engine.device),
        }

    def learning_rate(self, step: int) -> float:
        return scheduled_rate(self.config, step - self.first_step, self.total_steps - self.first_step)


def scheduled_rate(config: TrainEngineConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, linear or cosine decay to 0 at `total_steps`."""
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = math.ceil(config.lr_warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    span = max(1, total_steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    return config.lr * (1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
