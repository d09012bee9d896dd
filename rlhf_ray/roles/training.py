"""What the learner and the critic share: a step of `begin`, `learn` and `finish`, on any number of ranks.

A step that has all its rows learns from them at once, in as many optimiser steps as the config says, and what the loss
is divided by is inside it. A streamed step has one optimiser step, and its rows come in waves. How many tokens are
there is not known before the last, so gradients of sums are added up, and `finish` divides them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import normaliser
from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import CriticConfig, LearnerConfig
from rlhf_ray.config.sections import TrainEngineConfig
from rlhf_ray.errors import ConfigError, StepError
from rlhf_ray.models.devices import peak_memory_gb
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.trainable import SkippedSteps
from rlhf_ray.roles.advantages import answer_kl, token_advantages
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.checkpointed import Checkpointed
from rlhf_ray.roles.division import Division, RankBatch, Share
from rlhf_ray.roles.forward import over_shares
from rlhf_ray.roles.protocols import Estimate
from rlhf_ray.roles.sft_term import MicroLoss
from rlhf_ray.roles.shared_prompts import MicroBatch, PromptSharing

# (micro-batch, the share that it belongs to) -> (loss, what was counted).
LossOf = Callable[[MicroBatch, Share], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass
class Totals:
    """Statistics that add up over micro-batches and ranks; names that end in `_max` take the maximum."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, stats: Mapping[str, Tensor | float]) -> None:
        self.values = combine_stats([self.values, {name: float(value) for name, value in stats.items()}])

    def scale(self, prefix: str, factor: float) -> None:
        self.values |= {name: value * factor for name, value in self.values.items() if name.startswith(prefix)}

    def over_ranks(self, engine: TrainEngine) -> dict[str, float]:
        """The totals of all ranks. Collective."""
        combined: dict[str, float] = {}
        for op, wanted in (("sum", False), ("max", True)):
            names = sorted(name for name in self.values if name.endswith("_max") is wanted)
            if names:
                values = torch.tensor([self.values[name] for name in names], dtype=torch.float64)
                combined.update(zip(names, engine.all_reduce(values, op).tolist(), strict=True))
        return combined


@dataclass
class Step:
    """A step that has begun, and what it has added up so far."""

    number: int
    lr: float
    loss: Callable[..., tuple[Tensor, Mapping[str, Tensor]]]  # LossOf, with `first_epoch` as a keyword
    streamed: bool
    totals: Totals = field(default_factory=Totals)
    grad_norms: list[float] = field(default_factory=list)  # of the optimiser steps
    waves: int = 0
    # Of a streamed step: over all ranks, and a row that counts for nothing.
    tokens: int = 0
    sequences: int = 0
    dummy: MicroBatch | None = None


class TrainingRole(Checkpointed):
    """Takes steps, each in optimiser steps and micro-batches; base of `Learner` and `Critic`."""

    def __init__(
        self,
        engine: TrainEngine,
        config: LearnerConfig | CriticConfig,
        *,
        seed: int,
        total_steps: int,
        aggregation: str,
        first_step: int = 0,
        sharing: PromptSharing | None = None,
    ) -> None:
        """`first_step`: where the learning rate's schedule begins, for a policy that waits for its critic."""
        self.engine = engine
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.aggregation = aggregation
        self.first_step = first_step
        self.division = Division(
            config.minibatches, config.tokens_per_microbatch, seed, engine.world_size, sharing
        )
        self._step: Step | None = None
        self._skipped = SkippedSteps(config.max_skipped_steps)
        # Without gradients a recurrent layer takes another kernel, whose sums end differently in the last bit.
        self._needs_grad_kernels = any(isinstance(layer, torch.nn.RNNBase) for layer in engine.module.modules())

    # ---- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self, number: int, loss: Callable[..., Any], streamed: bool) -> None:
        """Open step `number`. `loss(micro, share, first_epoch=...)` returns a micro-batch's loss, and what was counted.

        Raises:
            StepError: another step is open.
            ConfigError: `streamed`, and the config asks for several optimiser steps a step.
        """
        if self._step is not None:
            raise StepError(f"begin({number}): step {self._step.number} has begun and not ended; call finish() first")
        epochs, minibatches = self.config.epochs, self.config.minibatches
        if streamed and epochs * minibatches > 1:
            raise ConfigError(
                f"a streamed step is one optimiser step over rows that come in waves; epochs={epochs} and minibatches="
                f"{minibatches} go over the rows of a whole step; set both to 1, or begin the step with streamed=False"
            )
        self._step = Step(number, self.learning_rate(number), loss, streamed)

    def learn(self, batch: Batch) -> None:
        """Learn from these rows: all of the step's, or if it is streamed one wave of them. Collective.

        Raises:
            StepError: no step has begun, or this one has had its only wave.
            DivergenceError: too many optimiser steps in a row had no finite gradient.
        """
        step = self._opened("learn")
        if step.waves and not step.streamed:
            raise StepError(
                f"learn: step {step.number} has learned from its rows already; call finish(), or begin a step that is "
                "to learn in several waves with streamed=True"
            )
        with self._given_up_if_it_fails():
            (self._add_wave if step.streamed else self._learn_all)(batch, step)
        step.waves += 1

    def finish(self) -> dict[str, float]:
        """End the step; its metrics by their final names. Collective.

        An optimiser step whose gradient is not finite was skipped and is counted. Raises StepError if no step has begun
        or it has learned from nothing (it is over then), and DivergenceError as `learn`.
        """
        step = self._opened("finish")
        if not step.waves:
            self._step = None
            raise StepError(f"finish: step {step.number} has learned from nothing and is over; call learn before it")
        with self._given_up_if_it_fails():
            if step.streamed:
                self._end_of_waves(step)
            metrics = self.metrics(step.totals.over_ranks(self.engine), step)
        self._step = None
        return metrics

    def metrics(self, totals: dict[str, float], step: Step) -> dict[str, float]:
        """By their final names, from what was counted on all ranks in a whole step."""
        raise NotImplementedError

    def more_losses(self, number: int, optimiser_step: int) -> Sequence[MicroLoss]:
        """Forward passes over other rows that belong to the optimiser step 0, 1, ... of a step; none, if not said."""
        return ()

    def is_far(self, stats: Totals) -> bool:
        """Whether this was the last optimiser step of the step, by what it has counted; all ranks say the same."""
        return False

    def _opened(self, call: str) -> Step:
        if self._step is None:
            raise StepError(f"{call}: no step has begun; call begin(step, ...), then learn(batch), then finish()")
        return self._step

    @contextmanager
    def _given_up_if_it_fails(self) -> Iterator[None]:
        """What a step that was cut off has added up must not become part of the next."""
        try:
            yield
        except BaseException:  # also a notebook's ctrl-C
            self._step = None
            self.engine.discard()
            raise

    def require_no_step(self, call: str) -> None:
        """Raises StepError inside a step: the weights are neither those before it nor those after it."""
        if self._step is not None:
            raise StepError(f"{call}: step {self._step.number} has begun and not ended; call finish() first")

    def _learn_all(self, batch: Batch, step: Step) -> None:
        for epoch in range(self.config.epochs):
            loss = partial(step.loss, first_epoch=epoch == 0)
            for share in self.shares(batch):
                more = self.more_losses(step.number, len(step.grad_norms))
                grad_norm, stats = self.optimiser_step(batch, share, loss, step.lr, more)
                step.grad_norms.append(grad_norm)
                step.totals.add(stats.values)
                if self.is_far(stats):
                    return

    def _add_wave(self, batch: Batch, step: Step) -> None:
        (share,) = self.shares(batch)
        step.tokens += share.total_tokens
        step.sequences += share.total_sequences
        sums = replace(share, total_tokens=1, total_sequences=1)
        self._add(batch, sums, partial(step.loss, first_epoch=True), step.totals, boundary=False)
        step.dummy = dummy_of(batch)

    def _end_of_waves(self, step: Step) -> None:
        """The boundary is a pass of its own, for no wave knows that it is the last; then one optimiser step."""
        divisor = normaliser(self.aggregation, total_tokens=step.tokens, total_sequences=step.sequences)
        step.totals.scale("loss/", 1 / divisor)
        more = self.more_losses(step.number, 0)
        if more:  # means of their own: what `step` divides them by does not concern them
            self._add_more(more, step.totals, divisor)
        else:
            loss, _ = step.loss(step.dummy, Share((), 0, 1, 1), first_epoch=True)
            self.engine.backward(loss, last=True)
            step.totals.add({"tokens_computed": step.dummy.tokens.numel()})
        grad_norm = self.engine.step(step.lr, 1 / divisor)
        self._skipped.count(grad_norm)
        step.grad_norms.append(grad_norm)

    # ---- passes over a batch --------------------------------------------------------------------------------------

    def shares(self, batch: Batch) -> Sequence[Share]:
        """This rank's share of each minibatch. The same batch always gives the same shares."""
        if isinstance(batch, RankBatch):
            return batch.shares
        return [ranks[self.engine.rank] for ranks in self.division.shares(batch.rows)]

    def per_token(self, batch: Batch, compute: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Apply `compute` with the very micro-batches of `learn`, so that both see bit-equal numbers. [B, T]; of
        several ranks, each has its own rows. Collective."""
        with torch.set_grad_enabled(self._needs_grad_kernels):
            return over_shares(batch, self.shares(batch), compute)

    def answer_kl(self, batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
        """[B] KL to the reference, summed over each answer's tokens."""
        return answer_kl(batch, algorithm)

    def token_advantages(self, batch: Batch, algorithm: AlgorithmConfig, kl_coef: float) -> Estimate:
        """Advantages of this rank's tokens; means and variances are those of all ranks. Collective."""
        return token_advantages(batch, algorithm, kl_coef, self.engine.all_reduce)

    def optimiser_step(
        self, batch: Batch, share: Share, loss_of: LossOf, lr: float, more: Sequence[MicroLoss] = ()
    ) -> tuple[float, Totals]:
        """Accumulate `loss_of` over the micro-batches of a share and step once; (gradient norm, this rank's totals).

        `more` are forward passes over other rows, as many on every rank: their gradients are added before clipping.
        Raises DivergenceError where too many steps in a row had to be skipped.
        """
        totals = Totals()
        self._add(batch, share, loss_of, totals, boundary=not more)
        self._add_more(more, totals)
        grad_norm = self.engine.step(lr)
        self._skipped.count(grad_norm)
        return grad_norm, totals

    def _add(self, batch: Batch, share: Share, loss_of: LossOf, totals: Totals, *, boundary: bool) -> None:
        """Gradients and counts of a share's micro-batches. `boundary`: they are the last of an optimiser step."""
        last = len(share.microbatches) - 1
        for index, micro in enumerate(share.batches(batch)):
            loss, stats = loss_of(micro, share)
            self.engine.backward(loss, last=boundary and index == last)
            totals.add(stats)
            sizes = micro.line_tokens
            real = sum(sizes) if index < share.real else 0
            totals.add({"tokens_computed": len(sizes) * max(sizes), "tokens_wanted": real})

    def _add_more(self, passes: Sequence[MicroLoss], totals: Totals, factor: float = 1.0) -> None:
        """The same of passes over other rows, with which an optimiser step ends."""
        for index, compute in enumerate(passes):
            loss, stats = compute()
            self.engine.backward(loss * factor, last=index == len(passes) - 1)
            totals.add(stats)

    def usage(self, totals: Mapping[str, float]) -> dict[str, float]:
        """How the device was used: the share of padding (dummy micro-batches too) in what was computed, and memory."""
        return {
            "perf/padding_frac": 1 - totals["tokens_wanted"] / max(1.0, totals["tokens_computed"]),
            "perf/peak_mem_gb": peak_memory_gb(self.engine.device),
        }

    def learning_rate(self, step: int) -> float:
        return scheduled_rate(self.config, step - self.first_step, self.total_steps - self.first_step)

    def _require_rest(self, call: str) -> None:
        self.require_no_step(call)


def dummy_of(batch: Batch) -> MicroBatch:
    """The shortest row alone, with an empty response mask: a pass over it adds exactly nothing."""
    micro = MicroBatch.of(batch, [(int(batch.lengths.argmin()),)])
    return micro.replace(response_mask=torch.zeros_like(micro.response_mask))


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
