"""From rewards to advantages: numbers a row where the scores are, numbers a token where the tokens' columns are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.advantages import MovingBaseline, discounted_returns, gae
from rlhf_ray.algo.aggregation import masked_sum
from rlhf_ray.algo.kl import kl_estimate
from rlhf_ray.algo.shaping import MomentsBySource, clip_reward, normalize_per_group, token_rewards
from rlhf_ray.algo.value_losses import explained_variance, value_stats
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.errors import DataError
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.formulas import GroupAdvantage
from rlhf_ray.roles.protocols import Estimate, TokenWork

WHITEN_EPS = 1e-8
Sum = Callable[[Tensor], Tensor]  # of all ranks' numbers


class OneProcess:
    """`TokenWork` of a whole batch."""

    def answer_kl(self, batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
        return answer_kl(batch, algorithm)

    def token_advantages(self, batch: Batch, algorithm: AlgorithmConfig, kl_coef: float) -> Estimate:
        return token_advantages(batch, algorithm, kl_coef)


class AdvantageEstimator:
    """Turns scores (and values, and log-probabilities) into advantages.

    Its only state is the running scale and the running mean of the rewards: a few numbers, saved in the checkpoint.
    """

    def __init__(self, algorithm: AlgorithmConfig, tokens: TokenWork | None = None) -> None:
        """`tokens`: who computes what needs columns of the tokens; None: this process, from the batch itself."""
        self.algorithm = algorithm
        self.tokens = tokens or OneProcess()
        self.reward_moments = MomentsBySource()
        self.moving_baseline = MovingBaseline()
        self._of_whole_answers = None if algorithm.advantage_facts.of_tokens else GroupAdvantage(algorithm)

    def estimate(self, batch: Batch, kl_coef: float) -> Estimate:
        """Advantages of a scored batch: [B] where they are the same for all tokens of an answer, else [B, T].

        Args:
            batch: with `score`; with `values` for gae; with `logp_old` and `logp_ref` if the KL is in the reward.
            kl_coef: present weight of the KL term.
        """
        algorithm = self.algorithm
        score_B, baseline_B = self._shape_rewards(batch)
        if algorithm.kl_in != "reward":
            batch = batch.replace(logp_ref=None)
        if self._of_whole_answers is None:
            return self.tokens.token_advantages(batch.replace(score=score_B), algorithm, kl_coef)
        reward_B, group_B = score_B, torch.tensor(batch.rows.prompt_id, dtype=torch.long)
        if batch.logp_ref is not None:
            reward_B = score_B - kl_coef * self.tokens.answer_kl(batch, algorithm)
        advantage_B = self._advantage_of_rows(reward_B, group_B, baseline_B)
        # An answer counts as often as it has tokens.
        length_B = torch.tensor(batch.rows.response_lengths, dtype=torch.float64)
        mean, variance = _moments(advantage_B, length_B)
        if algorithm.whiten_advantages:
            advantage_B = _white(advantage_B, mean, variance, length_B.sum())
            mean, variance = _moments(advantage_B, length_B)
        return Estimate({"advantages": advantage_B}, _spread(mean, variance))

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
            score_B = normalize_per_group(score_B, torch.tensor(batch.rows.prompt_id, dtype=torch.long))
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "reward_moments": self.reward_moments.state_dict(),
            "moving_baseline": self.moving_baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward_moments = MomentsBySource.from_state(state["reward_moments"])
        self.moving_baseline = MovingBaseline(**state["moving_baseline"])


def answer_kl(batch: Batch, algorithm: AlgorithmConfig) -> Tensor:
    """[B] KL to the reference, summed over each answer's tokens."""
    return masked_sum(kl_estimate(batch.logp_old, batch.logp_ref, algorithm.kl_estimator), batch.response_mask, dim=1)


def token_advantages(batch: Batch, algorithm: AlgorithmConfig, kl_coef: float, add: Sum = lambda own: own) -> Estimate:
    """Advantages that differ from token to token, and where there is a critic its targets.

    Args:
        batch: with shaped rewards as `score`, and with `logp_ref` if the KL is in the reward; of several ranks, each
            has its own rows.
        add: adds up what the ranks hold (all_reduce). Means and variances are those of the whole step.
    """
    mask_BT, kl_BT = batch.response_mask, torch.zeros(batch.tokens.shape)
    if batch.logp_ref is not None:
        kl_BT = kl_estimate(batch.logp_old, batch.logp_ref, algorithm.kl_estimator)
    reward_BT = token_rewards(batch.score, kl_BT, mask_BT, kl_coef)
    columns, stats = {}, {}
    if algorithm.advantage == "gae":
        advantage_BT, return_BT = gae(reward_BT, batch.values, mask_BT, gamma=algorithm.gamma, lam=algorithm.lam)
        columns["returns"] = return_BT
        stats["value/explained_variance"] = _explained(batch.values, return_BT, mask_BT, add)
    else:
        # Hu 2025, REINFORCE++: token returns, whitened over all tokens of the step.
        advantage_BT = _whitened(discounted_returns(reward_BT, mask_BT, algorithm.gamma), mask_BT, add)
    if algorithm.whiten_advantages:
        advantage_BT = _whitened(advantage_BT, mask_BT, add)
    columns["advantages"] = advantage_BT
    mean, variance, _ = _token_moments(advantage_BT, mask_BT, add)
    return Estimate(columns, _spread(mean, variance) | stats)


def _whitened(x_BT: Tensor, mask_BT: Tensor, add: Sum) -> Tensor:
    """As `masks.masked_whiten`, over the tokens of all ranks."""
    mean, variance, count = _token_moments(x_BT, mask_BT, add)
    return _white(x_BT, mean, variance, count).masked_fill(~mask_BT, 0.0)


def _white(x: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps), with Bessel's correction; 0 where nothing varies."""
    bessel = count / (count - 1).clamp(min=1)
    return ((x.double() - mean) * torch.rsqrt(variance * bessel + WHITEN_EPS)).to(x.dtype)


def _moments(x_B: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (without Bessel's correction) of weighted numbers, in float64."""
    total = weight_B.sum().clamp(min=1)
    mean = (x_B.double() * weight_B).sum() / total
    return mean, ((x_B.double() - mean) ** 2 * weight_B).sum() / total


def _token_moments(x_BT: Tensor, mask_BT: Tensor, add: Sum) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of all ranks' tokens. Float64: the order in which ranks add up must not show."""
    x_N = x_BT[mask_BT].double()
    total, count = add(torch.stack([x_N.sum(), torch.tensor(float(len(x_N)), dtype=torch.float64)]))
    mean = total / count.clamp(min=1)
    squares = add(((x_N - mean) ** 2).sum()[None])[0]
    return mean, squares / count.clamp(min=1), count


def _spread(mean: Tensor, variance: Tensor) -> dict[str, float]:
    return {"advantage/mean": float(mean), "advantage/std": float(variance.sqrt())}


def _explained(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, add: Sum) -> float:
    own: Mapping[str, Tensor] = value_stats(value_BT, return_BT, mask_BT)
    return explained_variance(dict(zip(own, add(torch.stack(list(own.values()))), strict=True)))
