"""KL divergence to a reference policy: estimators, their gradients, and the coefficient's controllers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0
MAX_LOG_WEIGHT = 2.0


def kl_estimate(logp_BT: Tensor, ref_BT: Tensor, estimator: str = "k3") -> Tensor:
    """kl_BT: one-sample estimate at each token of KL(policy || reference), from tokens drawn from the policy.

    With d = logp - ref (Schulman, "Approximating KL Divergence", 2020): k1 = d (unbiased, may be negative),
    k2 = d^2/2 (biased), k3 = exp(-d) - 1 + d (unbiased, never negative), abs = |d| (not a KL; a distance).
    Use these values in the reward (k1 there gives the exact gradient of the sequence KL) and in metrics. For
    a loss term use `kl_loss`: the gradient of an unbiased estimate is not an unbiased gradient.
    """
    d_BT = logp_BT - ref_BT
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return 0.5 * d_BT**2
    if estimator == "abs":
        return d_BT.abs()
    if estimator == "k3":
        # exp(50) swamps the batch mean: beyond MAX_LOG_RATIO continue along the tangent. A clamp would give
        # the tokens that drifted farthest a zero gradient (or, clamping exp alone, one that pushes them
        # further away).
        near_BT = torch.expm1((-d_BT).clamp(max=MAX_LOG_RATIO)) + d_BT
        slope = math.expm1(MAX_LOG_RATIO)
        far_BT = slope - MAX_LOG_RATIO + slope * (-d_BT - MAX_LOG_RATIO)
        return torch.where(-d_BT > MAX_LOG_RATIO, far_BT, near_BT)
    raise ValueError(f"kl: unknown estimator {estimator!r}; choose k1, k2, k3 or abs")


def kl_loss(
    logp_BT: Tensor,
    ref_BT: Tensor,
    estimator: str = "k3",
    *,
    unbiased_gradient: bool = True,
    old_BT: Tensor | None = None,
) -> Tensor:
    """kl_BT to add to a loss: the estimator's value with the gradient of k2.

    For tokens drawn from the policy E[grad k2] = E[d grad logp] = grad KL(policy || reference) of the
    next-token distribution. Differentiated as they stand, k1 has expected gradient 0 (it only adds noise), k3
    that of the other direction, KL(reference || policy), and abs twice that of the total variation. TRL and
    DeepSeekMath (GRPO) use k3's own gradient: `unbiased_gradient=False`. `old_BT`, the log-probs of the policy
    that drew the tokens, weighs the gradient by the importance ratio (at most e^2) in later inner epochs.
    """
    kl_BT = kl_estimate(logp_BT, ref_BT, estimator)
    if not unbiased_gradient:
        return kl_BT
    slope_BT = kl_estimate(logp_BT, ref_BT, "k2")
    if old_BT is not None:
        slope_BT = slope_BT * (logp_BT - old_BT).detach().clamp(max=MAX_LOG_WEIGHT).exp()
    return kl_BT.detach() + slope_BT - slope_BT.detach()


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that no measured KL changes."""

    coef: float

    def update(self, kl: float, n: int = 1) -> FixedKL:
        return self

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class AdaptiveKL:
    """Proportional control in log space (Ziegler et al. 2019, section 2.2): steer the measured KL towards
    `target`.

    e = clip(kl/target - 1, -0.2, 0.2); coef <- coef * (1 + e * n/horizon), n in the unit of `horizon`
    (samples in TRL and verl). n/horizon is capped at 1: without the cap a large batch turns the coefficient
    negative.
    """

    coef: float
    target: float
    horizon: float = 10_000.0

    def update(self, kl: float, n: int = 1) -> AdaptiveKL:
        if not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * min(n / self.horizon, 1.0)))

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class ScheduledKL:
    """`AdaptiveKL` whose target moves in a straight line from `target` to `target_end` over `span` units of
    n.
    """

    coef: float
    target: float
    target_end: float
    span: float
    horizon: float = 10_000.0
    elapsed: float = 0.0

    @property
    def target_now(self) -> float:
        return self.target + (self.target_end - self.target) * min(self.elapsed / self.span, 1.0)

    def update(self, kl: float, n: int = 1) -> ScheduledKL:
        coef = AdaptiveKL(self.coef, self.target_now, self.horizon).update(kl, n).coef
        return replace(self, coef=coef, elapsed=self.elapsed + n)

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


KLController = FixedKL | AdaptiveKL | ScheduledKL
