"""Losses on preferences: the reward model's, DPO's and its relatives'.

One loss a pair, a ranking or an answer, [B]; take the mean.
"""

from __future__ import annotations

import math

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


def simpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float = 2.0, *, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma) (Meng et al. 2024, eq. 6).

    The log-probs are means over the answers' tokens; there is no reference. gamma is in units of beta times them.
    """
    return -logsigmoid(beta * (chosen_B - rejected_B) - gamma)


def orpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float = 0.1) -> Tensor:
    """-log pi(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)) (Hong et al. 2024, eq. 6 and 7).

    odds = p / (1 - p), where log p is the mean of the log-probs over an answer's tokens, which is what is passed in
    and what the first term (the paper's supervised loss) is of. There is no reference.
    """
    ratio_B = log_odds(chosen_B) - log_odds(rejected_B)
    return -chosen_B - beta * logsigmoid(ratio_B)


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) of log-probabilities below 0; one that has rounded to 0 counts as the number before it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    # Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7: each form loses digits on the other's side.
    small = logp > -math.log(2.0)
    far, near = logp.masked_fill(small, -1.0), logp.masked_fill(~small, -0.5)
    return logp - torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def kto_loss(
    policy_logp_B: Tensor,
    ref_logp_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_B, reward_B) of single answers labelled good or bad (Ethayarajh et al. 2024, eq. 8); reward = beta r.

    r = log pi - log ref of the whole answer. good: w (1 - sigmoid(beta (r - z))); bad: w (1 - sigmoid(beta (z - r))).
    `kl` is the estimate of KL(pi || ref) in nats an answer: the mean of r over answers that belong to other prompts;
    z = max(0, kl), and no gradient goes through it.
    """
    r_B, desirable_B = policy_logp_B - ref_logp_B, desirable_B.bool()
    z = torch.as_tensor(kl, dtype=r_B.dtype, device=r_B.device).detach().clamp(min=0.0)
    towards_B = torch.where(desirable_B, r_B - z, z - r_B)
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight).to(r_B.dtype)
    return weight_B * (1.0 - torch.sigmoid(beta * towards_B)), beta * r_B.detach()
