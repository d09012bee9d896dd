"""Importance weights for data that another policy produced: other kernels in the generator, or older weights.

Multiply the policy loss per token with `weight_BT`. It never carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import masked_mean, masked_sum
from rlhf_ray.algo.policy_losses import log_ratio

LEVELS = ("token", "sequence", "geometric")


@torch.no_grad()
def importance_weights(
    logp_BT: Tensor,
    gen_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """weight_BT = pi_learner / pi_generator, bounded; 0 outside the mask.

    level: `token` rho_t (low variance; biased: it ignores how the earlier tokens came about), `sequence` prod
    rho_t (unbiased before bounding, high variance), `geometric` (prod rho_t)^(1/|y|) (a test for drift, not a
    correction). mode: `truncate` caps at `high` (truncated importance sampling, Yao et al. 2025), `mask`
    drops what lies outside [low, high] (IcePop, MIS), `none` leaves the weight as it is.
    """
    d_BT = log_ratio(logp_BT, gen_BT, mask_BT)
    if level == "sequence":
        d_BT = log_ratio(d_BT.sum(1, keepdim=True).expand_as(d_BT), torch.zeros_like(d_BT), mask_BT)
    elif level == "geometric":
        d_BT = masked_mean(d_BT, mask_BT, dim=1)[:, None].expand_as(d_BT)
    elif level != "token":
        raise ValueError(f"correction: unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    weight_BT = d_BT.exp()
    if mode == "truncate":
        weight_BT = weight_BT.clamp(max=high)
    elif mode == "mask":
        weight_BT = weight_BT.masked_fill((weight_BT < low) | (weight_BT > high), 0.0)
    elif mode != "none":
        raise ValueError(f"correction: unknown mode {mode!r}; choose truncate, mask or none")
    return weight_BT.masked_fill(~mask_BT.bool(), 0.0)


@torch.no_grad()
def mismatch_stats(logp_BT: Tensor, gen_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Additive sums (and one maximum) that compare the learner's log-probs with the generator's on its own tokens.

    count; kl_sum of KL(generator || learner) by k3; absdiff_sum, absdiff_max in nats; weight_sum,
    weight_sq_sum of rho for the effective sample size. Join with `policy_losses.combine_stats`, then
    `mismatch_summary`.
    """
    d_BT = log_ratio(logp_BT, gen_BT, mask_BT)
    # Not the clamped ratio: an alarm must see a difference of 50 nats, or of infinity.
    absdiff_BT = (logp_BT - gen_BT).abs().masked_fill(~mask_BT.bool(), 0.0)
    return {
        "count": mask_BT.bool().sum().to(d_BT.dtype),
        "kl_sum": masked_sum(torch.expm1(d_BT) - d_BT, mask_BT),
        "absdiff_sum": absdiff_BT.sum(),
        "absdiff_max": absdiff_BT.max(),
        "weight_sum": masked_sum(d_BT.exp(), mask_BT),
        "weight_sq_sum": masked_sum((2.0 * d_BT).exp(), mask_BT),
    }


def mismatch_summary(stats: dict[str, Tensor]) -> dict[str, float]:
    """kl, absdiff_mean, absdiff_max, and ess = (sum w)^2 / (n sum w^2), the share of tokens that effectively count."""
    count = float(stats["count"])
    if count == 0:
        return {"kl": 0.0, "absdiff_mean": 0.0, "absdiff_max": 0.0, "ess": 1.0}
    return {
        "kl": float(stats["kl_sum"]) / count,
        "absdiff_mean": float(stats["absdiff_sum"]) / count,
        "absdiff_max": float(stats["absdiff_max"]),
        "ess": float(stats["weight_sum"]) ** 2 / (count * float(stats["weight_sq_sum"])),
    }
