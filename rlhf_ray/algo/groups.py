"""Statistics inside groups: rows with equal labels in `group_B` answer the same prompt."""

from __future__ import annotations

from torch import Tensor


def group_index(group_B: Tensor) -> tuple[Tensor, Tensor]:
    """(index_B in 0..G-1, size_G) of each row's group; labels need not be sorted or contiguous."""
    _, index_B, size_G = group_B.unique(return_inverse=True, return_counts=True)
    return index_B, size_G


def centre_and_size(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """(reward minus its group's mean, the group's size), both [B]; exactly 0 where a group's rewards are
    equal.
    """
    index_B, size_G = group_index(group_B)
    low_G = _extreme(reward_B, index_B, len(size_G), "amin")
    # The float mean of equal numbers need not equal them, and a division by their tiny std would blow that
    # rounding up into an advantage. Relative to the group's minimum they are exact zeros.
    above_B = reward_B - low_G[index_B]
    mean_G = above_B.new_zeros(len(size_G)).index_add(0, index_B, above_B) / size_G
    return above_B - mean_G[index_B], size_G[index_B]


def group_std(centred_B: Tensor, group_B: Tensor) -> Tensor:
    """Standard deviation (Bessel) of each row's group, [B], from centred rewards; 0 for a group of one."""
    index_B, size_G = group_index(group_B)
    squares_G = centred_B.new_zeros(len(size_G)).index_add(0, index_B, centred_B**2)
    return (squares_G / (size_G - 1).clamp(min=1)).sqrt()[index_B]


def informative_groups(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """keep_B: true where the group's rewards differ (DAPO's dynamic sampling, Yu et al. 2025, section 3.2).

    The others have advantage 0 under every group baseline: they only dilute the batch.
    """
    index_B, size_G = group_index(group_B)
    low_G = _extreme(reward_B, index_B, len(size_G), "amin")
    high_G = _extreme(reward_B, index_B, len(size_G), "amax")
    return (high_G > low_G)[index_B]


def _extreme(x_B: Tensor, index_B: Tensor, groups: int, reduce: str) -> Tensor:
    return x_B.new_zeros(groups).scatter_reduce(0, index_B, x_B, reduce, include_self=False)
