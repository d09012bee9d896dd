"""The critic: predicts the return of every state, so that PPO can tell luck from merit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlhf_ray.algo.aggregation import loss_weights
from rlhf_ray.algo.value_losses import clipped_value_loss
from rlhf_ray.config.schema import CriticConfig
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.written import Written
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.forward import critic_values
from rlhf_ray.roles.training import Share, Totals, TrainingRole


class Critic(TrainingRole):
    """A value head on its own backbone, fitted by a clipped squared error."""

    config: CriticConfig

    def __init__(self, engine: TrainEngine, config: CriticConfig, *, seed: int, total_steps: int) -> None:
        super().__init__(engine, config, seed=seed, total_steps=total_steps)

    def values(self, batch: Batch) -> Tensor:
        """[B, T] value of the state in which each token is chosen; 0 outside the response."""
        return self.per_token(
            batch,
            lambda micro: critic_values(self.engine, micro, self.engine.device)
            * micro.response_mask.to(self.engine.device),
        )

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """Fit `batch.returns`, clipping around `batch.values`; metrics by their final names.

        A step whose gradient is not finite is skipped and counted.
        """
        lr = self.learning_rate(step)
        totals, grad_norms = Totals(), []
        for _ in range(self.config.epochs):
            for share in self.shares(batch):
                grad_norm, stats = self.optimiser_step(batch, share, self._loss, lr)
                grad_norms.append(grad_norm)
                totals.add(stats.values)
        finite = [norm for norm in grad_norms if math.isfinite(norm)]
        sums = totals.over_ranks(self.engine)
        return {
            "loss/value": sums["loss/value"] / len(grad_norms),
            "critic/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "critic/skipped_steps": float(len(grad_norms) - len(finite)),
            "critic/lr": lr,
            **self.usage(sums),  # the learner's take its place, unless the policy rests
        }

    def _loss(self, micro: Batch, share: Share) -> tuple[Tensor, Mapping[str, Tensor]]:
        device = self.engine.device
        mask_BT = micro.response_mask.to(device)
        value_BT = critic_values(self.engine, micro, device)
        loss_BT = clipped_value_loss(
            value_BT, micro.values.to(device), micro.returns.to(device), clip=self.config.value_clip
        )
        weight_BT = loss_weights(
            mask_BT, "token_mean", total_tokens=share.total_tokens, total_sequences=share.total_sequences
        )
        loss = (loss_BT * weight_BT).sum()
        return loss, {"loss/value": loss.detach()}

    def save(self, folder: Path) -> Written | None:
        return self.engine.save(folder)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)
