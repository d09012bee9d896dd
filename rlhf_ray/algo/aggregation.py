"""From numbers a token to one number: over the tokens that count, whatever the split into micro-batches and ranks.

Masked-out entries are replaced, not multiplied by zero: a NaN or an infinity in the padding must not reach the result.

The mean's denominator of a loss belongs to the whole optimiser step: a mean of micro-batch means weighs a token by the
company it happens to keep. So each token gets its weight from global totals, and everybody only ever sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum_const")


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


def loss_totals(mask_BT: Tensor) -> Tensor:
    """[2] = (tokens, sequences with at least one token): sum over all micro-batches and ranks of the step."""
    mask_BT = mask_BT.bool()
    return torch.stack([mask_BT.sum(), mask_BT.any(1).sum()])


def normaliser(mode: str = "token_mean", *, total_tokens: float, total_sequences: float) -> float:
    """What divides every weight of an optimiser step alike.

    While the totals are not known, pass 1 for both to `loss_weights`, and divide sums and gradients by this afterwards.
    """
    return max(float(total_tokens if mode == "token_mean" else total_sequences), 1.0)


def loss_weights(
    mask_BT: Tensor,
    mode: str = "token_mean",
    *,
    total_tokens: float,
    total_sequences: float,
    constant: float | None = None,
) -> Tensor:
    """weight_BT such that sum(loss_BT * weight_BT) over all micro-batches and ranks is the aggregated loss.

    token_mean: 1/total_tokens, every token equal (DAPO). seq_mean: 1/(|y_i| total_sequences), every
    completion equal (GRPO). seq_sum_const: 1/(constant total_sequences), constant = the longest completion
    allowed (Dr.GRPO). Totals are those of the whole optimiser step (`loss_totals`, summed); 0 gives weight 0.
    """
    divisor = normaliser(mode, total_tokens=total_tokens, total_sequences=total_sequences)
    weight_BT = mask_BT.to(torch.float32) / divisor
    if mode == "token_mean":
        return weight_BT
    if mode == "seq_mean":
        return weight_BT / weight_BT.count_nonzero(dim=1).clamp(min=1)[:, None]
    if mode == "seq_sum_const":
        if not constant or constant <= 0:
            raise ValueError("aggregation seq_sum_const: needs a positive constant; set it to the longest completion")
        return weight_BT / float(constant)
    raise ValueError(f"aggregation: unknown mode {mode!r}; choose one of {', '.join(AGGREGATIONS)}")
