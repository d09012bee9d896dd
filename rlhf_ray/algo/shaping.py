"""Rewards before they become advantages: penalties, normalisation, clipping, and their place on the
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rlhf_ray.algo.advantages import centre_and_size, group_std

_SMALLEST_SCALE = 1e-8


def token_rewards(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, coef: float) -> Tensor:
    """reward_BT = -coef * kl_t at each token of the mask, plus the score on the last one (Ouyang et al.
    2022, eq. 2).
    """
    mask_BT = mask_BT.bool()
    reward_BT = (-coef * kl_BT.detach()).masked_fill(~mask_BT, 0.0)
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = torch.where(mask_BT, position_T, -1).amax(1, keepdim=True)
    return reward_BT + torch.where(position_T == last_B1, score_B[:, None].to(reward_BT.dtype), 0.0)


def overlong_penalty(length_B: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length - buffer, then falling to -1 at max_length (Yu et al. 2025, DAPO, eq. 13)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong penalty: buffer={buffer} must lie in 1..max_length={max_length}")
    return ((max_length - buffer - length_B.float()) / buffer).clamp(-1.0, 0.0)


def length_penalty(length_B: Tensor, target: int, per_token: float) -> Tensor:
    """-per_token for each token beyond `target`, float64."""
    return -per_token * (length_B.double() - target).clamp(min=0.0)


def repetition_penalty(completions: Sequence[Sequence[Hashable]], n: int = 3, weight: float = 1.0) -> Tensor:
    """penalty_B = -weight * (1 - distinct n-grams / n-grams) of token ids (or words), float64; 0 for an answer
    shorter than n + 1.
    """
    distinct = []
    for ids in completions:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        distinct.append(len(set(grams)) / len(grams) if grams else 1.0)
    return weight * (torch.tensor(distinct, dtype=torch.float64) - 1.0)


def clip_reward(reward_B: Tensor, low: float, high: float) -> Tensor:
    """Rewards bounded to [low, high]."""
    return reward_B.clamp(low, high)


def normalize_per_group(reward_B: Tensor, group_B: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(r - mean_group) / (std_group + eps): each prompt's answers on one scale."""
    centred_B, _ = centre_and_size(reward_B, group_B)
    return centred_B / (group_std(centred_B, group_B) + eps)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of every reward seen so far (Welford; Chan's parallel update)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, reward_B: Tensor) -> RunningMoments:
        n = reward_B.numel()
        if n == 0:
            return self
        x_B = reward_B.detach().cpu().double()
        mean = float(x_B.mean())
        m2 = float(((x_B - mean) ** 2).sum())
        total, gap = self.count + n, mean - self.mean
        return RunningMoments(total, self.mean + gap * n / total, self.m2 + m2 + gap**2 * self.count * n / total)

    @property
    def std(self) -> float:
        """With Bessel's correction; 1 until two rewards have been seen."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 1.0

    def normalize(self, reward_B: Tensor, *, center: bool = True) -> Tensor:
        # As long as all rewards were equal there is no scale to divide by.
        scale = self.std if self.std > _SMALLEST_SCALE else 1.0
        return (reward_B - (self.mean if center else 0.0)) / scale

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class MomentsBySource:
    """`RunningMoments` for each source (data set, task), so that an easy one does not drown a hard one."""

    sources: Mapping[str, RunningMoments] = field(default_factory=dict)

    def update(self, reward_B: Tensor, source_B: Sequence[str]) -> MomentsBySource:
        sources = dict(self.sources)
        for name, rows in _rows_by_source(source_B).items():
            sources[name] = sources.get(name, RunningMoments()).update(reward_B[rows])
        return MomentsBySource(sources)

    def normalize(self, reward_B: Tensor, source_B: Sequence[str], *, center: bool = True) -> Tensor:
        out_B = reward_B.clone()
        for name, rows in _rows_by_source(source_B).items():
            out_B[rows] = self.sources.get(name, RunningMoments()).normalize(reward_B[rows], center=center)
        return out_B

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: moments.state_dict() for name, moments in self.sources.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, float]]) -> MomentsBySource:
        return cls({name: RunningMoments(**moments) for name, moments in state.items()})


def _rows_by_source(source_B: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(source_B):
        rows.setdefault(name, []).append(row)
    return rows
