"""Is a judge's confidence what it says, and does it only look at length? All on [N] tensors, one number a case."""

from __future__ import annotations

import torch
from torch import Tensor


def calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): the mean of |accuracy - confidence| over equal-width bins
    of [0, 1], each weighted by its number of cases. A confidence of exactly 1 belongs to the last bin.
    """
    bin_N = (confidence_N.double() * bins).long().clamp(0, bins - 1)
    gap_K = torch.zeros(bins, dtype=torch.float64)
    gap_K.index_add_(0, bin_N, correct_N.double() - confidence_N.double())
    return float(gap_K.abs().sum() / max(len(bin_N), 1))


def preference_confidence(margin_N: Tensor) -> tuple[Tensor, Tensor]:
    """(confidence_N, correct_N) of Bradley-Terry predictions: sigmoid(|margin|) that the higher score is preferred.

    `margin_N` is score(chosen) - score(rejected); equal scores are half right.
    """
    correct_N = (torch.sign(margin_N.double()) + 1) / 2
    return torch.sigmoid(margin_N.double().abs()), correct_N


def correlation(x_N: Tensor, y_N: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    x_N, y_N = x_N.double() - x_N.double().mean(), y_N.double() - y_N.double().mean()
    scale = float(x_N.norm() * y_N.norm())
    return float(x_N @ y_N) / scale if scale > 0 else 0.0


def histogram(values_SN: list[Tensor], bins: int = 20) -> tuple[list[float], list[list[int]]]:
    """(bin edges, counts of each series) over one common range, so that the series can be laid over each other."""
    merged_N = torch.cat([values_N.double() for values_N in values_SN])
    low, high = float(merged_N.min()), float(merged_N.max())
    high = high if high > low else low + 1.0
    counts = [torch.histc(values_N.double(), bins, low, high).long().tolist() for values_N in values_SN]
    return torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(), counts
