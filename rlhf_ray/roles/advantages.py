"""From rewards to advantages: the only place that sees a whole step's rows together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.advantages import gae, reinforce_pp
from rlhf_ray.algo.kl import kl_estimate
from rlhf_ray.algo.masks import masked_mean, masked_sum, masked_whiten
from rlhf_ray.algo.registry import ADVANTAGES, options_of
from rlhf_ray.algo.shaping import RunningMoments, token_rewards
from rlhf_ray.algo.value_losses import explained_variance, value_stats
from rlhf_ray.batch import Batch
from rlhf_ray.config.schema import AlgorithmConfig
from rlhf_ray.roles.protocols import Estimate

_SMALLEST_SCALE = 1e-8


class AdvantageEstimator:
    """Turns scores (and values, and log-probabilities) into per-token advantages.

    Its only state is the running scale of the rewards: a few numbers, saved in the checkpoint.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        self.reward_moments = RunningMoments()

    def estimate(self, batch: Batch, kl_coef: float) -> Estimate:
        """Advantages of a scored batch.

        Args:
            batch: with `score`; with `values` for gae; with `logp_old` and `logp_ref` if the KL is in the reward.
            kl_coef: present weight of the KL term.
        """
        algorithm, mask_BT = self.algorithm, batch.response_mask
        score_B = self._shape_rewards(batch.score)
        kl_BT = self._kl_in_reward(batch)
        columns: dict[str, Tensor] = {}
        if algorithm.advantage == "gae":
            reward_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef)
            columns["advantages"], columns["returns"] = gae(
                reward_BT, batch.values, mask_BT, gamma=algorithm.gamma, lam=algorithm.lam
            )
        elif algorithm.advantage == "reinforce_pp":
            reward_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef)
            columns["advantages"], _ = reinforce_pp(reward_BT, mask_BT, algorithm.gamma)
        else:
            reward_B = score_B - kl_coef * masked_sum(kl_BT, mask_BT, dim=1)
            advantage_B = self._of_whole_answers(reward_B, batch.prompt_id)
            columns["advantages"] = advantage_B[:, None] * mask_BT
        if algorithm.whiten_advantages:
            columns["advantages"] = masked_whiten(columns["advantages"], mask_BT)
        return Estimate(columns, self._stats(batch, columns))

    def _of_whole_answers(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        estimator = ADVANTAGES[self.algorithm.advantage]
        settings = self.algorithm.model_dump()
        return estimator(reward_B, group_B, **{n: settings[n] for n in options_of(estimator) if n in settings})

    def _shape_rewards(self, score_B: Tensor) -> Tensor:
        if self.algorithm.normalize_rewards:
            self.reward_moments = self.reward_moments.update(score_B)
            # As long as all rewards were equal there is no scale to divide by.
            std = self.reward_moments.std
            score_B = score_B / (std if std > _SMALLEST_SCALE else 1.0)
        if self.algorithm.reward_clip is not None:
            score_B = score_B.clamp(-self.algorithm.reward_clip, self.algorithm.reward_clip)
        return score_B

    def _kl_in_reward(self, batch: Batch) -> Tensor:
        if self.algorithm.kl_in != "reward" or batch.logp_ref is None:
            return torch.zeros(batch.tokens.shape)
        return kl_estimate(batch.logp_old, batch.logp_ref, self.algorithm.kl_estimator)

    def _stats(self, batch: Batch, columns: dict[str, Tensor]) -> dict[str, float]:
        mask_BT, advantage_BT = batch.response_mask, columns["advantages"]
        mean = masked_mean(advantage_BT, mask_BT)
        stats = {
            "advantage/mean": float(mean),
            "advantage/std": float(masked_mean((advantage_BT - mean) ** 2, mask_BT).sqrt()),
        }
        if "returns" in columns:
            stats["value/explained_variance"] = explained_variance(
                value_stats(batch.values, columns["returns"], mask_BT)
            )
        return stats

    def state_dict(self) -> dict[str, Any]:
        return {"reward_moments": self.reward_moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward_moments = RunningMoments(**state["reward_moments"])
