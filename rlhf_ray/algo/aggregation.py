"""From a loss per token to one number, whatever the split into micro-batches and ranks.

The mean's denominator belongs to the whole optimiser step: a mean of micro-batch means weighs a token by the
company it happens to keep. So each token gets its weight from global totals, and everybody only ever sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum_const")


def loss_totals(mask_BT: Tensor) -> Tensor:
    """[2] = (tokens, sequences with at least one token): sum over all micro-batches and ranks of the step."""
    mask_BT = mask_BT.bool()
    return torch.stack([mask_BT.sum(), mask_BT.any(1).sum()])


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
    weight_BT = mask_BT.to(torch.float32)
    if mode == "token_mean":
        return weight_BT / max(float(total_tokens), 1.0)
    weight_BT = weight_BT / max(float(total_sequences), 1.0)
    if mode == "seq_mean":
        return weight_BT / weight_BT.count_nonzero(dim=1).clamp(min=1)[:, None]
    if mode == "seq_sum_const":
        if not constant or constant <= 0:
            raise ValueError("aggregation seq_sum_const: needs a positive constant; set it to the longest completion")
        return weight_BT / float(constant)
    raise ValueError(f"aggregation: unknown mode {mode!r}; choose one of {', '.join(AGGREGATIONS)}")
