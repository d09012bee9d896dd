from __future__ import annotations

import pytest
import torch

from rlhf_ray.algo.aggregation import loss_totals, loss_weights, normaliser

LOSS_BT = torch.tensor([[1.0, 2.0, 3.0], [10.0, 50.0, 50.0]])
MASK_BT = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token_mean", 16 / 4), ("seq_mean", (2 + 10) / 2), ("seq_sum_const", (6 + 10) / (2 * 8))],
)
@pytest.mark.parametrize("split", [[[0, 1]], [[0], [1]], [[1], [0]]])
def test_by_hand_whatever_the_split(mode, expected, split):
    tokens, sequences = sum(loss_totals(MASK_BT[rows]) for rows in split).tolist()
    assert (tokens, sequences) == (4, 2)
    total = 0.0
    for rows in split:
        weight_BT = loss_weights(MASK_BT[rows], mode, total_tokens=tokens, total_sequences=sequences, constant=8)
        total += float((LOSS_BT[rows] * weight_BT).sum())
    assert total == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "sums", "divisor"), [("token_mean", 16, 4), ("seq_mean", 2 + 10, 2), ("seq_sum_const", (6 + 10) / 8, 2)]
)
def test_by_hand_where_the_totals_are_known_afterwards(mode, sums, divisor):
    weight_BT = loss_weights(MASK_BT, mode, total_tokens=1, total_sequences=1, constant=8)
    assert float((LOSS_BT * weight_BT).sum()) == pytest.approx(sums)
    assert normaliser(mode, total_tokens=4, total_sequences=2) == divisor
    assert normaliser(mode, total_tokens=0, total_sequences=0) == 1


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean", "seq_sum_const"])
def test_a_dummy_row_weighs_nothing(mode):
    empty_BT = torch.zeros(1, 3, dtype=torch.bool)
    assert loss_totals(empty_BT).tolist() == [0, 0]
    assert loss_weights(empty_BT, mode, total_tokens=0, total_sequences=0, constant=8).tolist() == [[0.0] * 3]


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="longest completion"):
        loss_weights(MASK_BT, "seq_sum_const", total_tokens=4, total_sequences=2)
    with pytest.raises(ValueError, match="token_mean, seq_mean"):
        loss_weights(MASK_BT, "mean", total_tokens=4, total_sequences=2)
