"""Sums, means and whitening over the tokens that count.

Masked-out entries are replaced, not multiplied by zero: a NaN or an infinity in the padding must not reach
the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x_BT` where the mask is true; a scalar, or reduced along `dim`."""
    kept_BT = x_BT.masked_fill(~mask_BT.bool(), 0.0)
    return kept_BT.sum() if dim is None else kept_BT.sum(dim)


def masked_mean(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x_BT` where the mask is true; 0 where nothing is."""
    count = mask_BT.bool().sum() if dim is None else mask_BT.bool().sum(dim)
    return masked_sum(x_BT, mask_BT, dim) / count.clamp(min=1)


def masked_whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, *, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the mask, 0 outside it; `shift_mean=False` adds the mean back.

    The variance has Bessel's correction, as in TRL and verl. One token, or equal values, give 0 and never NaN.
    """
    count = mask_BT.bool().sum()
    mean = masked_mean(x_BT, mask_BT)
    var = masked_sum((x_BT - mean) ** 2, mask_BT) / (count - 1).clamp(min=1)
    white_BT = (x_BT - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        white_BT = white_BT + mean
    return white_BT.masked_fill(~mask_BT.bool(), 0.0)
