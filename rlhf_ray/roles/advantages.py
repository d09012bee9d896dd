"""From rewards to advantages: the only place that sees a whole step's rows together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.advantages import MovingBaseline, gae, reinforce_pp
from rlhf_ray.algo.kl import kl_estimate
from rlhf_ray.algo.masks import masked_mean, masked_sum, masked_whiten
from rlhf_ray.algo.shaping import MomentsBySource, clip_reward, normalize_per_group, token_rewards
from rlhf_ray.algo.value_losses import explained_variance, value_stats
from rlhf_ray.batch import Batch
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.errors import DataError
from rlhf_ray.roles.formulas import GroupAdvantage
from rlhf_ray.roles.protocols import Estimate


class AdvantageEstimator:
    """Turns scores (and values, and log-probabilities) into per-token advantages.

    Its only state is the running scale and the running mean of the rewards: a few numbers, saved in the checkpoint.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        self.reward_moments = MomentsBySource()
        self.moving_baseline = MovingBaseline()
        self._of_whole_answers = None if algorithm.advantage_facts.of_tokens else GroupAdvantage(algorithm)

    def estimate(self, batch: Batch, kl_coef: float) -> Estimate:
        """Advantages of a scored batch.

        Args:
            batch: with `score`; with `values` for gae; with `logp_old` and `logp_ref` if the KL is in the reward.
            kl_coef: present weight of the KL term.
        """
        algorithm, mask_BT = self.algorithm, batch.response_mask
        score_B, baseline_B = self._shape_rewards(batch)
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
            advantage_B = self._advantage_of_rows(reward_B, batch.prompt_id, baseline_B)
            columns["advantages"] = advantage_B[:, None] * mask_BT
        if algorithm.whiten_advantages:
            columns["advantages"] = masked_whiten(columns["advantages"], mask_BT)
        return Estimate(columns, self._stats(batch, columns))

    def _advantage_of_rows(self, reward_B: Tensor, group_B: Tensor, baseline_B: Tensor | None) -> Tensor:
        more: dict[str, Any] = {}
        if self.algorithm.advantage_facts.baseline == "greedy":
            more["baseline_B"] = baseline_B
        if self.algorithm.moving_baseline:
            more["baseline"] = self.moving_baseline.value  # of the steps before: it does not know this batch
            self.moving_baseline = self.moving_baseline.update(reward_B)
        return self._of_whole_answers(reward_B, group_B, **more)

    def _shape_rewards(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Rewards of the answers and of the greedy answers (if there are any), on one scale."""
        algorithm, score_B, baseline_B = self.algorithm, batch.score, batch.baseline
        if algorithm.normalize_rewards == "group":
            score_B = normalize_per_group(score_B, batch.prompt_id)
        elif algorithm.normalize_rewards != "none":
            source_B = self._sources(batch)
            self.reward_moments = self.reward_moments.update(score_B, source_B)
            score_B = self.reward_moments.normalize(score_B, source_B, center=False)
            if baseline_B is not None:
                baseline_B = self.reward_moments.normalize(baseline_B, source_B, center=False)
        if algorithm.reward_clip is not None:
            bound = algorithm.reward_clip
            score_B = clip_reward(score_B, -bound, bound)
            baseline_B = None if baseline_B is None else clip_reward(baseline_B, -bound, bound)
        return score_B, baseline_B

    def _sources(self, batch: Batch) -> list[str]:
        """Whose scale each row's reward belongs to."""
        if self.algorithm.normalize_rewards == "running":
            return ["all"] * len(batch)
        name = self.algorithm.source_field
        for row in batch.columns:
            if name not in row:
                raise DataError(
                    f"algorithm.normalize_rewards=source: a prompt has no column {name!r} (it has "
                    f"{', '.join(map(repr, row))}); add it to the data, or set algorithm.source_field"
                )
        return [str(row[name]) for row in batch.columns]

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
        return {
            "reward_moments": self.reward_moments.state_dict(),
            "moving_baseline": self.moving_baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward_moments = MomentsBySource.from_state(state["reward_moments"])
        self.moving_baseline = MovingBaseline(**state["moving_baseline"])
