"""What a policy learns from preferences: DPO and IPO against a reference, SimPO and ORPO without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.algo.preference import dpo_loss, orpo_loss, simpo_loss
from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import TokenizedExample, TokenizedPair
from rlhf_ray.roles.objectives import Measured, PairObjective, SupervisedBatch, language_model_inputs


@dataclass(frozen=True)
class ReferencedPair:
    """A pair and what the reference policy thinks of it: log-probabilities summed over the answer's tokens."""

    pair: TokenizedPair
    chosen_logp: float
    rejected_logp: float

    @property
    def chosen(self) -> TokenizedExample:
        return self.pair.chosen

    @property
    def rejected(self) -> TokenizedExample:
        return self.pair.rejected

    @property
    def source(self) -> str:
        return self.pair.source


class PolicyPreferences(PairObjective):
    """What the objectives of a policy on pairs share."""

    def __init__(self, pad_token_id: int, config: DPOLossConfig) -> None:
        super().__init__(pad_token_id)
        self.config = config

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        return language_model_inputs(batch)

    def metrics(self, measured: Measured) -> dict[str, float]:
        """By the names that TRL gives them."""
        chosen_N, rejected_N = measured["chosen_reward"], measured["rejected_reward"]
        return {
            "loss": float(measured["loss"].mean()),
            "rewards/chosen": float(chosen_N.mean()),
            "rewards/rejected": float(rejected_N.mean()),
            "rewards/accuracies": float((chosen_N > rejected_N).double().mean()),
            "rewards/margins": float((chosen_N - rejected_N).mean()),
            "logps/chosen": float(measured["chosen_logp"].mean()),
            "logps/rejected": float(measured["rejected_logp"].mean()),
        }

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        return self.metrics(measured), {}


class DPO(PolicyPreferences):
    """Direct preference optimisation against reference log-probabilities that were computed before the first step.

    Its items are `ReferencedPair`.
    """

    def extra(self, items: Sequence[ReferencedPair]) -> dict[str, Tensor]:
        return {
            "reference_chosen": torch.tensor([item.chosen_logp for item in items], dtype=torch.float32),
            "reference_rejected": torch.tensor([item.rejected_logp for item in items], dtype=torch.float32),
        }

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        chosen_P, rejected_P = answer_logprobs(outputs, batch).chunk(2)
        ref_chosen_P, ref_rejected_P = batch.extra["reference_chosen"], batch.extra["reference_rejected"]
        lengths_P, settings = batch.lengths.clamp(min=1).chunk(2), self.config
        # IPO compares means over tokens (see `dpo_loss`).
        by_chosen, by_rejected = lengths_P if settings.kind == "ipo" else (1, 1)
        loss_P, _, _ = dpo_loss(
            chosen_P / by_chosen, rejected_P / by_rejected, ref_chosen_P / by_chosen, ref_rejected_P / by_rejected,
            settings.beta, kind=settings.kind, label_smoothing=settings.label_smoothing,
            nll_weight=settings.nll_weight, chosen_length_B=None if settings.kind == "ipo" else lengths_P[0],
        )  # fmt: skip
        return {
            "loss": loss_P,
            "chosen_logp": chosen_P.detach(), "rejected_logp": rejected_P.detach(),
            "chosen_reward": settings.beta * (chosen_P.detach() - ref_chosen_P),
            "rejected_reward": settings.beta * (rejected_P.detach() - ref_rejected_P),
        }  # fmt: skip


class ReferenceFree(PolicyPreferences):
    """SimPO and ORPO: the policy's own mean log-probability a token is the reward, and there is no reference."""

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        by_answer = zip(answer_logprobs(outputs, batch).chunk(2), batch.lengths.clamp(min=1).chunk(2), strict=True)
        chosen_P, rejected_P = (logp_P / length_P for logp_P, length_P in by_answer)
        settings = self.config
        if settings.kind == "simpo":
            loss_P = simpo_loss(chosen_P, rejected_P, settings.beta, gamma=settings.gamma)
        else:
            loss_P = orpo_loss(chosen_P, rejected_P, settings.beta)
        return {
            "loss": loss_P,
            "chosen_logp": chosen_P.detach(), "rejected_logp": rejected_P.detach(),
            "chosen_reward": settings.beta * chosen_P.detach(), "rejected_reward": settings.beta * rejected_P.detach(),
        }  # fmt: skip


def answer_logprobs(outputs: Any, batch: SupervisedBatch) -> Tensor:
    """[B] log-probability of each row's answer, summed over its tokens."""
    return token_logprobs(outputs.logits, batch.tokens, mask_BT=batch.learned).sum(1)
