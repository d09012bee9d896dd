"""Policy losses. Each returns a loss per token, loss_BT, 0 outside the mask; `aggregation.loss_weights` does the mean.

`logp_BT` carries the gradient; `old_BT` (the policy before the update) and `adv_BT` never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import masked_mean, masked_sum

MAX_LOG_RATIO = 20.0
Number = TypeVar("Number", Tensor, float)


def log_ratio(logp_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """logp - old on the mask, 0 outside it, clamped so that exp stays finite."""
    # Outside the mask the two may be anything, -inf too: fill before exp, or inf * 0 = NaN reaches the gradient.
    d_BT = (logp_BT - old_BT.detach()).masked_fill(~mask_BT.bool(), 0.0)
    return d_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    adv_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(rho A, clip(rho, 1-low, 1+high) A) (Schulman et al. 2017, PPO, eq. 7).

    clip_high > clip_low is DAPO's "clip-higher" (Yu et al. 2025, eq. 10). `dual_clip` c > 1 bounds the loss at
    -c A where A < 0 (Ye et al. 2020, eq. 5): else one ratio of 100 with a negative advantage dominates the step.
    """
    ratio_BT = log_ratio(logp_BT, old_BT, mask_BT).exp()
    loss_BT = _pessimistic(ratio_BT, adv_BT.detach(), clip_low, clip_high)
    if dual_clip is not None:
        bounded_BT = torch.minimum(loss_BT, -dual_clip * adv_BT.detach())
        loss_BT = torch.where(adv_BT < 0, bounded_BT, loss_BT)
    return loss_BT.masked_fill(~mask_BT.bool(), 0.0)


def gspo_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    adv_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """The clipped loss with the sequence's ratio s = exp(mean_t log rho_t) (Zheng et al. 2025, GSPO,
    eq. 5, 7).

    This is the paper's GSPO-token form (eq. 13), s_t = sg[s] * pi/sg[pi]: the same value and gradient as GSPO when all
    tokens of a completion share an advantage, and defined when they do not. Aggregate with `seq_mean`. The
    clip range is two orders of magnitude below PPO's because s is a geometric mean.
    """
    d_BT = log_ratio(logp_BT, old_BT, mask_BT)
    s_B1 = masked_mean(d_BT, mask_BT, dim=1)[:, None].detach()
    ratio_BT = (s_B1 + d_BT - d_BT.detach()).exp()
    loss_BT = _pessimistic(ratio_BT, adv_BT.detach(), clip_low, clip_high)
    return loss_BT.masked_fill(~mask_BT.bool(), 0.0)


def cispo_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    adv_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Tensor:
    """-sg[clip(rho, 1-low, 1+high)] A logp (MiniMax-M1, 2025, eq. 4, 5).

    The weight is clipped, not the token: every token keeps a gradient. clip_low = 1 means no lower bound.
    """
    ratio_BT = log_ratio(logp_BT, old_BT, mask_BT).exp()
    weight_BT = ratio_BT.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight_BT * _kept(adv_BT.detach(), mask_BT) * _kept(logp_BT, mask_BT)


def policy_gradient_loss(logp_BT: Tensor, old_BT: Tensor, adv_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """-A logp (Williams 1992, REINFORCE). Correct for one step on fresh data: `old_BT` is not used."""
    return -_kept(adv_BT.detach(), mask_BT) * _kept(logp_BT, mask_BT)


def _kept(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return x_BT.masked_fill(~mask_BT.bool(), 0.0)


def _pessimistic(ratio_BT: Tensor, adv_BT: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.maximum(-ratio_BT * adv_BT, -ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high) * adv_BT)


def past_clip(
    ratio_BT: Tensor, adv_BT: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> Tensor:
    """Tokens that have no gradient in the clipped loss: their ratio has already gone as far as the advantage wants."""
    past_BT = torch.where(adv_BT >= 0, ratio_BT > 1.0 + clip_high, ratio_BT < 1.0 - clip_low)
    return past_BT if dual_clip is None else past_BT | ((adv_BT < 0) & (ratio_BT > dual_clip))


def outside_clip(ratio_BT: Tensor, adv_BT: Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0) -> Tensor:
    """Tokens whose weight CISPO clips."""
    return (ratio_BT > 1.0 + clip_high) | (ratio_BT < 1.0 - clip_low)


def nowhere(ratio_BT: Tensor, adv_BT: Tensor) -> Tensor:
    """Of a loss that clips nothing."""
    return torch.zeros_like(ratio_BT, dtype=torch.bool)


@torch.no_grad()
def ratio_stats(
    logp_BT: Tensor,
    old_BT: Tensor,
    mask_BT: Tensor,
    adv_BT: Tensor,
    clips: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    of_answers: bool = False,
) -> dict[str, Tensor]:
    """Sums and maxima over tokens that combine exactly over micro-batches and ranks (`combine_stats`).

    count; ratio_sum, ratio_max; approx_kl_sum of KL(old || new) by k3, rho - 1 - log rho; with `clips` clipped_sum, the
    tokens of an advantage that it names.

    Args:
        clips: (ratio_BT, adv_BT) -> the tokens that the loss clips, as `past_clip`.
        of_answers: the ratio is the answer's, as GSPO has it.
    """
    d_BT = log_ratio(logp_BT, old_BT, mask_BT)
    if of_answers:
        d_BT = masked_mean(d_BT, mask_BT, dim=1)[:, None].expand_as(d_BT).masked_fill(~mask_BT.bool(), 0.0)
    ratio_BT = d_BT.exp()
    stats = {
        "count": mask_BT.bool().sum().to(ratio_BT.dtype),
        "ratio_sum": masked_sum(ratio_BT, mask_BT),
        "ratio_max": ratio_BT.masked_fill(~mask_BT.bool(), 0.0).max(),
        "approx_kl_sum": masked_sum(torch.expm1(d_BT) - d_BT, mask_BT),
    }
    if clips is not None:
        clipped_BT = clips(ratio_BT, adv_BT) & (adv_BT != 0)
        stats["clipped_sum"] = masked_sum(clipped_BT.to(ratio_BT.dtype), mask_BT)
    return stats


def combine_stats(parts: Iterable[Mapping[str, Number]]) -> dict[str, Number]:
    """Join the statistics of several micro-batches: names ending in `_max` by maximum, all others by sum."""
    joined: dict[str, Number] = {}
    for part in parts:
        for name, value in part.items():
            if name not in joined:
                joined[name] = value
            else:
                joined[name] = max(joined[name], value) if name.endswith("_max") else joined[name] + value
    return joined
