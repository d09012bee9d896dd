"""The critic: predicts the return of every state, so that PPO can tell luck from merit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from rlhf_ray.algo.aggregation import loss_weights
from rlhf_ray.algo.value_losses import clipped_value_loss
from rlhf_ray.config.schema import CriticConfig
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.forward import critic_values
from rlhf_ray.roles.training import Share, Step, TrainingRole


class Critic(TrainingRole):
    """A value head on its own backbone, fitted by a clipped squared error."""

    config: CriticConfig

    def __init__(self, engine: TrainEngine, config: CriticConfig, *, seed: int, total_steps: int) -> None:
        super().__init__(engine, config, seed=seed, total_steps=total_steps, aggregation="token_mean")

    def values(self, batch: Batch) -> Tensor:
        """[B, T] value of the state in which each token is chosen; 0 outside the response."""
        return self.per_token(
            batch,
            lambda micro: critic_values(self.engine, micro, self.engine.device)
            * micro.response_mask.to(self.engine.device),
        )

    def begin(self, step: int, streamed: bool = False) -> None:
        """Open a step that fits `returns`, clipping around `values`. As `Learner.begin`."""
        self.begin_step(step, self.loss, streamed)

    def metrics(self, totals: dict[str, float], step: Step) -> dict[str, float]:
        """By their final names, the loss averaged over the optimiser steps."""
        finite = [norm for norm in step.grad_norms if math.isfinite(norm)]
        return {
            "loss/value": totals["loss/value"] / len(step.grad_norms),
            "critic/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "critic/skipped_steps": float(len(step.grad_norms) - len(finite)),
            "critic/lr": step.lr,
            **self.usage(totals),  # the learner's take its place, unless the policy rests
        }

    def loss(self, micro: Batch, share: Share, *, first_epoch: bool) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of a micro-batch, and what was counted."""
        device = self.engine.device
        mask_BT = micro.response_mask.to(device)
        value_BT = critic_values(self.engine, micro, device)
        loss_BT = clipped_value_loss(
            value_BT, micro.values.to(device), micro.returns.to(device), clip=self.config.value_clip
        )
        weight_BT = loss_weights(
            mask_BT, self.aggregation, total_tokens=share.total_tokens, total_sequences=share.total_sequences
        )
        loss = (loss_BT * weight_BT).sum()
        return loss, {"loss/value": loss.detach()}
