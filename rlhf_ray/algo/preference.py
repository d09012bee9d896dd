"""Losses on preferences: the reward model's and DPO's. One loss a pair (or a ranking), [B]; take the mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023,
    eq. 2).
    """
    return -logsigmoid(chosen_B - rejected_B - margin_B)


def ranked_loss(score_BK: Tensor, rank_BK: Tensor, margin: float = 0.0) -> Tensor:
    """Mean of `bradley_terry_loss` over the C(K,2) pairs of K ranked answers (Ouyang et al. 2022, eq. 1).

    rank 0 is the best; equal ranks make no pair; a rank below 0 marks an absent answer.
    """
    better_BKK = (rank_BK[:, :, None] < rank_BK[:, None, :]) & (rank_BK[:, :, None] >= 0)
    loss_BKK = bradley_terry_loss(score_BK[:, :, None], score_BK[:, None, :], margin)
    pairs_B = better_BKK.sum((1, 2)).clamp(min=1)
    return loss_BKK.masked_fill(~better_BKK, 0.0).sum((1, 2)) / pairs_B


def dpo_loss(
    policy_chosen_logp_B: Tensor,
    policy_rejected_logp_B: Tensor,
    ref_chosen_logp_B: Tensor,
    ref_rejected_logp_B: Tensor,
    beta: float = 0.1,
    *,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    chosen_length_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_B, chosen_reward_B, rejected_reward_B), rewards = beta (log pi - log ref), without gradient.

    h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected). `sigmoid`: -log sigmoid(beta h) (Rafailov
    et al. 2023, eq. 7). label_smoothing e > 0 is cDPO: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)
    (Mitchell 2023). `ipo`: (h - 1/(2 beta))^2 (Azar et al. 2023, eq. 17); pass log-probs averaged over
    tokens, as TRL does, or lengths decide. nll_weight adds -log pi(chosen) / length (RPO, Pang et al. 2024);
    it needs `chosen_length_B`, the number of tokens where the log-probs are sums.
    """
    chosen_B = policy_chosen_logp_B - ref_chosen_logp_B
    rejected_B = policy_rejected_logp_B - ref_rejected_logp_B
    h_B = chosen_B - rejected_B
    if kind == "sigmoid":
        loss_B = -(1.0 - label_smoothing) * logsigmoid(beta * h_B) - label_smoothing * logsigmoid(-beta * h_B)
    elif kind == "ipo":
        loss_B = (h_B - 1.0 / (2.0 * beta)) ** 2
    else:
        raise ValueError(f"dpo: unknown kind {kind!r}; choose sigmoid or ipo")
    if nll_weight:
        length_B = torch.ones_like(h_B) if chosen_length_B is None else chosen_length_B.clamp(min=1)
        loss_B = loss_B - nll_weight * policy_chosen_logp_B / length_B
    return loss_B, beta * chosen_B.detach(), beta * rejected_B.detach()
