"""What the learner and the critic share: walking a batch in optimiser steps, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import CriticConfig, LearnerConfig
from rlhf_ray.config.sections import TrainEngineConfig
from rlhf_ray.models.devices import peak_memory_gb
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.trainable import SkippedSteps
from rlhf_ray.roles.advantages import answer_kl, token_advantages
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Division, RankBatch, Share
from rlhf_ray.roles.forward import over_microbatches
from rlhf_ray.roles.protocols import Estimate
from rlhf_ray.roles.sft_term import MicroLoss
from rlhf_ray.roles.shared_prompts import MicroBatch, PromptSharing


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


class TrainingRole:
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
        self.division = Division(
            config.minibatches, config.tokens_per_microbatch, seed, engine.world_size, sharing
        )
        self._skipped = SkippedSteps(config.max_skipped_steps)
        # Without gradients a recurrent layer takes another kernel, whose sums end differently in the last bit.
        self._needs_grad_kernels = any(isinstance(layer, torch.nn.RNNBase) for layer in engine.module.modules())

    def shares(self, batch: Batch) -> Sequence[Share]:
        """This rank's share of each minibatch. The same batch always gives the same shares."""
        if isinstance(batch, RankBatch):
            return batch.shares
        return [ranks[self.engine.rank] for ranks in self.division.shares(batch.rows)]

    def per_token(self, batch: Batch, compute: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Apply `compute` with the very micro-batches of `update`, so that both see bit-equal numbers. [B, T]; of
        several ranks, each has its own rows. Collective."""
        out_BT = torch.zeros(batch.tokens.shape)
        with torch.set_grad_enabled(self._needs_grad_kernels):
            for share in self.shares(batch):
                out_BT += over_microbatches(batch, share.microbatches[: share.real], compute)
                for lines in share.microbatches[share.real :]:
                    compute(MicroBatch.of(batch, lines))  # keeps this rank in step with the others' collectives
        return out_BT

    def answer_kl(self, batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
        """[B] KL to the reference, summed over each answer's tokens."""
        return answer_kl(batch, algorithm)

    def token_advantages(self, batch: Batch, algorithm: AlgorithmConfig, kl_coef: float) -> Estimate:
        """Advantages of this rank's tokens; means and variances are those of all ranks. Collective."""
        return token_advantages(batch, algorithm, kl_coef, self.engine.all_reduce)

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
