"""Advantage estimators.

Scalar ones, one number a completion: `f(reward_B, group_B, **options) -> adv_B`; give every token of the
completion that number: `adv_BT = adv_B[:, None] * mask_BT`. Token ones, `gae` and `reinforce_pp`, take
rewards at tokens. `group_B` [B] int64 labels the rows that answer the same prompt; labels need not be sorted
or contiguous. A group of one has advantage 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import masked_whiten


def grpo(reward_B: Tensor, group_B: Tensor, *, normalize_std: bool = True, eps: float = 1e-4) -> Tensor:
    """(r - mean_group) / (std_group + eps) (Shao et al. 2024, DeepSeekMath, section 4.1.2); std has Bessel's
    n-1.
    """
    centred_B, _ = centre_and_size(reward_B, group_B)
    return centred_B / (group_std(centred_B, group_B) + eps) if normalize_std else centred_B


def dr_grpo(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """r - mean_group, no std (Liu et al. 2025, "Understanding R1-Zero-like training", section 3.2).

    The other half of Dr.GRPO is the aggregation `seq_sum_const`.
    """
    return grpo(reward_B, group_B, normalize_std=False)


def rloo(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """r minus the mean of the *other* rewards of its group (Kool et al. 2019; Ahmadian et al. 2024, RLOO)."""
    centred_B, size_B = centre_and_size(reward_B, group_B)
    # r_i - mean_{j != i} r_j = (r_i - mean) n / (n - 1)
    return centred_B * size_B / (size_B - 1).clamp(min=1)


def reinforce(reward_B: Tensor, group_B: Tensor, *, baseline: float | None = None) -> Tensor:
    """r - baseline (Williams 1992); None is the batch mean, a number a moving one (see `MovingBaseline`).

    The batch mean contains the row itself, which shrinks the expected gradient by 1 - 1/B.
    """
    if baseline is not None:
        return reward_B - baseline
    return centre_and_size(reward_B, torch.zeros_like(group_B))[0]


@dataclass(frozen=True)
class MovingBaseline:
    """Exponential moving average of the mean reward, corrected for its start at 0. Use `value`, then
    `update`.
    """

    decay: float = 0.9
    average: float = 0.0
    updates: int = 0

    @property
    def value(self) -> float:
        return self.average / (1.0 - self.decay**self.updates) if self.updates else 0.0

    def update(self, reward_B: Tensor) -> MovingBaseline:
        average = self.decay * self.average + (1.0 - self.decay) * float(reward_B.mean())
        return MovingBaseline(self.decay, average, self.updates + 1)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


def reinforce_pp_baseline(
    reward_B: Tensor, group_B: Tensor, *, length_B: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """r - mean_group, then whitened over the whole batch (Hu et al. 2025, REINFORCE++-baseline).

    `length_B` weighs each row by its number of tokens in the batch mean and std, as verl does.
    """
    centred_B, _ = centre_and_size(reward_B, group_B)
    weight_B = torch.ones_like(centred_B) if length_B is None else length_B.to(centred_B.dtype)
    total = weight_B.sum().clamp(min=1)
    mean = (weight_B * centred_B).sum() / total
    var = (weight_B * (centred_B - mean) ** 2).sum() / (total - 1).clamp(min=1)
    return (centred_B - mean) * torch.rsqrt(var + eps)


def remax(reward_B: Tensor, group_B: Tensor, *, baseline_B: Tensor) -> Tensor:
    """r minus the reward of the greedy answer to the same prompt (Li et al. 2023, ReMax)."""
    return reward_B - baseline_B


def pass_at_k(reward_B: Tensor, group_B: Tensor, *, k: int = 4) -> Tensor:
    """Unbiased advantage for E[max reward of k answers] (Walder & Karkhanis 2025, PKPO, eq. 33, the
    "LOO-1" baseline).

    adv_i = n/C(n,k) * sum over k-subsets I of the group that contain i of (max_I r - max_{I without i} r):
    what answer i adds to the best of k. With sorted rewards, i on top and j second leave C(j, k-2) choices.
    k = 1 is `rloo`; a group smaller than k uses its own size.
    """
    if k == 1:
        return rloo(reward_B, group_B)
    index_B, size_G = group_index(group_B)
    row_B, size_B = index_B.argsort(stable=True), size_G[index_B]
    adv_B = torch.zeros_like(reward_B)
    for n in size_G.unique().tolist():
        size = min(k, n)
        if size < 2:
            continue
        row_GN = row_B[size_B[row_B] == n].view(-1, n)
        sorted_GN, order_GN = reward_B[row_GN].sort(dim=1)
        share_N = sorted_GN.new_tensor([n * math.comb(j, size - 2) / math.comb(n, size) for j in range(n)])
        gap_GNN = (sorted_GN[:, :, None] - sorted_GN[:, None, :]).tril(-1)
        adv_B[row_GN.gather(1, order_GN)] = gap_GNN @ share_N
    return adv_B


@torch.no_grad()
def gae(
    reward_BT: Tensor,
    value_BT: Tensor,
    mask_BT: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(adv_BT, return_BT), 0 outside the mask (Schulman et al. 2016, GAE, eq. 16).

    delta_t = r_t + gamma V_next - V_t; A_t = delta_t + gamma lam A_next; return = A + V. value_BT[:, t] is
    the value of the state in which token t was chosen. "Next" is the next token *in the mask*: text from
    tools or environments is skipped, neither discounted nor valued. `bootstrap_B` is the value after the last
    token (0: it ended there).
    """
    mask_BT = mask_BT.bool()
    adv_BT = torch.zeros_like(value_BT)
    next_value_B = torch.zeros_like(value_BT[:, 0]) if bootstrap_B is None else bootstrap_B
    next_adv_B = torch.zeros_like(value_BT[:, 0])
    for t in reversed(range(value_BT.shape[1])):
        on_B = mask_BT[:, t]
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_adv_B = torch.where(on_B, delta_B + gamma * lam * next_adv_B, next_adv_B)
        next_value_B = torch.where(on_B, value_BT[:, t], next_value_B)
        adv_BT[:, t] = next_adv_B
    adv_BT = adv_BT.masked_fill(~mask_BT, 0.0)
    return adv_BT, (adv_BT + value_BT).masked_fill(~mask_BT, 0.0)


def discounted_returns(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """return_BT: G_t = r_t + gamma G_next over the tokens in the mask, 0 outside it (reward-to-go)."""
    return gae(reward_BT, torch.zeros_like(reward_BT), mask_BT, gamma, 1.0)[1]


def reinforce_pp(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """(adv_BT, return_BT): discounted token returns, whitened over all tokens of the batch (Hu 2025,
    REINFORCE++).

    `reward_BT` usually holds -coef*KL at each token and the score on the last (`shaping.token_rewards`).
    """
    return_BT = discounted_returns(reward_BT, mask_BT, gamma)
    return masked_whiten(return_BT, mask_BT), return_BT


# ---- statistics inside groups ---------------------------------------------------------------------------------------


def group_index(group_B: Tensor) -> tuple[Tensor, Tensor]:
    """(index_B in 0..G-1, size_G) of each row's group."""
    _, index_B, size_G = group_B.unique(return_inverse=True, return_counts=True)
    return index_B, size_G


def centre_and_size(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """(reward minus its group's mean, the group's size), both [B]; exactly 0 where a group's rewards are
    equal.
    """
    index_B, size_G = group_index(group_B)
    low_G = _extreme(reward_B, index_B, len(size_G), "amin")
    # The float mean of equal numbers need not equal them, and a division by their tiny std would blow that
    # rounding up into an advantage. Relative to the group's minimum they are exact zeros.
    above_B = reward_B - low_G[index_B]
    mean_G = above_B.new_zeros(len(size_G)).index_add(0, index_B, above_B) / size_G
    return above_B - mean_G[index_B], size_G[index_B]


def group_std(centred_B: Tensor, group_B: Tensor) -> Tensor:
    """Standard deviation (Bessel) of each row's group, [B], from centred rewards; 0 for a group of one."""
    index_B, size_G = group_index(group_B)
    squares_G = centred_B.new_zeros(len(size_G)).index_add(0, index_B, centred_B**2)
    return (squares_G / (size_G - 1).clamp(min=1)).sqrt()[index_B]


def informative_groups(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """keep_B: true where the group's rewards differ (DAPO's dynamic sampling, Yu et al. 2025, section 3.2).

    The others have advantage 0 under every group baseline: they only dilute the batch.
    """
    index_B, size_G = group_index(group_B)
    low_G = _extreme(reward_B, index_B, len(size_G), "amin")
    high_G = _extreme(reward_B, index_B, len(size_G), "amax")
    return (high_G > low_G)[index_B]


def _extreme(x_B: Tensor, index_B: Tensor, groups: int, reduce: str) -> Tensor:
    return x_B.new_zeros(groups).scatter_reduce(0, index_B, x_B, reduce, include_self=False)
