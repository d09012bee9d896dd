from __future__ import annotations

import torch

from rlhf_ray.algo.aggregation import masked_mean, masked_sum, masked_whiten

X_BT = torch.tensor([[1.0, 2.0, 99.0], [3.0, float("nan"), float("inf")]])
MASK_BT = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_ignore_what_is_masked_even_nan():
    assert masked_sum(X_BT, MASK_BT) == 6.0
    assert masked_mean(X_BT, MASK_BT) == 2.0
    assert masked_sum(X_BT, MASK_BT, dim=1).tolist() == [3.0, 3.0]
    assert masked_mean(X_BT, MASK_BT, dim=1).tolist() == [1.5, 3.0]


def test_empty_mask_gives_zero():
    nothing_BT = torch.zeros_like(MASK_BT)
    assert masked_mean(X_BT, nothing_BT) == 0.0
    assert masked_whiten(X_BT, nothing_BT).tolist() == [[0.0] * 3] * 2


def test_whiten_of_1_2_3_is_minus_one_zero_one():
    # mean 2, variance with n-1: (1 + 0 + 1) / 2 = 1
    white_BT = masked_whiten(X_BT, MASK_BT)
    torch.testing.assert_close(white_BT, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    kept_BT = masked_whiten(X_BT, MASK_BT, shift_mean=False)
    torch.testing.assert_close(kept_BT, torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]))


def test_whiten_of_one_token_or_equal_tokens_is_zero():
    one_BT = torch.tensor([[False, True, False], [False, False, False]])
    assert masked_whiten(X_BT, one_BT).abs().max() == 0.0
    assert masked_whiten(torch.full((2, 3), 0.1), MASK_BT).abs().max() < 1e-3
