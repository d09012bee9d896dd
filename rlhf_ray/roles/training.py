"""What the learner and the critic share: walking a batch in optimiser steps, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
from rlhf_ray.roles.forward import over_microbatches
from rlhf_ray.roles.microbatch import split_microbatches, split_minibatches, split_ranks
from rlhf_ray.roles.packing import pack_numbers, packed_sizes, plan_packs, rows_of


@dataclass(frozen=True)
class Share:
    """This rank's part of one optimiser step.

    All ranks hold the same number of micro-batches: a rank that has run out repeats a row with an empty
    response mask, for every forward and backward pass is a collective.
    """

    microbatches: tuple[tuple[int, ...], ...]
    real: int  # how many of them are not dummies
    total_tokens: int  # response tokens of the whole minibatch, over all ranks
    total_sequences: int
    pack: Tensor | None = None  # [B], see Batch.pack

    def batches(self, batch: Batch) -> Iterator[Batch]:
        batch = batch.replace(pack=self.pack)
        for index, rows in enumerate(self.microbatches):
            micro = batch.select(rows)
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
        pack_tokens: int = 0,
    ) -> None:
        self.engine = engine
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.pack_tokens = pack_tokens
        # Without gradients a recurrent layer takes another kernel, whose sums end differently in the last bit.
        self._needs_grad_kernels = any(isinstance(layer, torch.nn.RNNBase) for layer in engine.module.modules())

    def shares(self, batch: Batch) -> list[Share]:
        """One `Share` for each minibatch. The same batch always gives the same shares."""
        prompts = batch.prompt_id.tolist()
        return [self._share(batch, rows) for rows in split_minibatches(prompts, self.config.minibatches, self.seed)]

    def _share(self, batch: Batch, rows: list[int]) -> Share:
        packs, sizes = plan_packs(batch, rows, self.pack_tokens)
        ranks = split_ranks(range(len(packs)), sizes, self.engine.world_size)
        parts = [split_microbatches(rank, sizes, self.config.tokens_per_microbatch) for rank in ranks]
        mine = parts[self.engine.rank]
        shortest = sizes.index(min(sizes))
        dummies = [[shortest]] * (max(len(part) for part in parts) - len(mine))
        tokens, sequences = loss_totals(batch.response_mask[rows]).tolist()
        return Share(
            microbatches=tuple(tuple(rows_of(packs, part)) for part in [*mine, *dummies]),
            real=len(mine),
            total_tokens=tokens,
            total_sequences=sequences,
            pack=pack_numbers(batch, packs) if self.pack_tokens else None,
        )

    def per_token(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """Apply `compute` with the very micro-batches of `update`, so that both see bit-equal numbers. [B, T]"""
        out_BT = torch.zeros(batch.tokens.shape)
        with torch.set_grad_enabled(self._needs_grad_kernels):
            for share in self.shares(batch):
                packed = batch.replace(pack=share.pack)
                out_BT += over_microbatches(packed, share.microbatches[: share.real], compute)
                for rows in share.microbatches[share.real :]:
                    compute(packed.select(rows))  # keeps this rank in step with the others' collectives
        return self.engine.all_reduce(out_BT) if self.engine.world_size > 1 else out_BT

    def optimiser_step(
        self,
        batch: Batch,
        share: Share,
        loss_of: Callable[[Batch, Share], tuple[Tensor, Mapping[str, Tensor]]],
        lr: float,
    ) -> tuple[float, Totals]:
        """Accumulate `loss_of` over the micro-batches of a share and step once; (gradient norm, this rank's totals)."""
        totals = Totals()
        last = len(share.microbatches) - 1
        for index, micro in enumerate(share.batches(batch)):
            loss, stats = loss_of(micro, share)
            self.engine.backward(loss, last=index == last)
            totals.add(stats)
            sizes = packed_sizes(micro)
            real = sum(sizes) if index < share.real else 0
            totals.add({"tokens_computed": len(sizes) * max(sizes), "tokens_wanted": real})
        return self.engine.step(lr), totals

    def usage(self, totals: Mapping[str, float]) -> dict[str, float]:
        """How the device was used: the share of padding (dummy micro-batches too) in what was computed, and memory."""
        return {
            "perf/padding_frac": 1 - totals["tokens_wanted"] / max(1.0, totals["tokens_computed"]),
            "perf/peak_mem_gb": peak_memory_gb(self.engine.device),
        }

    def learning_rate(self, step: int) -> float:
        return scheduled_rate(self.config, step, self.total_steps)


def scheduled_rate(config: TrainEngineConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, linear or cosine decay to 0 at `total_steps`."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    span = max(1, total_steps - config.lr_warmup_steps)
    progress = min(1.0, (step - config.lr_warmup_steps) / span)
    return config.lr * (1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
