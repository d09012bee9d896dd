"""The critic's loss and how well it explains the returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import masked_sum


def clipped_value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """loss_BT = 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    From the code released with PPO (OpenAI baselines); the paper does not have it.
    `clip=None` is the plain squared error.
    """
    plain_BT = (value_BT - return_BT.detach()) ** 2
    if clip is None:
        return 0.5 * plain_BT
    near_BT = old_value_BT.detach() + (value_BT - old_value_BT.detach()).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain_BT, (near_BT - return_BT.detach()) ** 2)


@torch.no_grad()
def value_stats(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Additive sums for `explained_variance`."""
    # Variances from sums cancel badly in float32; MPS alone has no float64.
    dtype = torch.float32 if value_BT.device.type == "mps" else torch.float64
    target_BT = return_BT.to(dtype)
    error_BT = target_BT - value_BT.to(dtype)
    return {
        "count": mask_BT.bool().sum().to(dtype),
        "return_sum": masked_sum(target_BT, mask_BT),
        "return_sq_sum": masked_sum(target_BT**2, mask_BT),
        "error_sum": masked_sum(error_BT, mask_BT),
        "error_sq_sum": masked_sum(error_BT**2, mask_BT),
    }


def explained_variance(stats: dict[str, Tensor]) -> float:
    """1 - Var(return - value) / Var(return): 1 is perfect, 0 no better than a constant, below 0 worse.

    0 where the returns do not vary (nothing to explain).
    """
    count = max(float(stats["count"]), 1.0)
    variance = float(stats["return_sq_sum"]) / count - (float(stats["return_sum"]) / count) ** 2
    residual = float(stats["error_sq_sum"]) / count - (float(stats["error_sum"]) / count) ** 2
    scale = float(stats["return_sq_sum"]) / count
    return 1.0 - residual / variance if variance > 1e-12 * max(scale, 1e-12) else 0.0
