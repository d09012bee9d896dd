from __future__ import annotations

import pytest

from rlhf_ray.data.length_balance import length_balance


def test_hand_worked_numbers():
    # chosen 3, 1, 4, 2; rejected 1, 2, 2, 2: longer in two of the three that differ.
    # All lengths: mean 2.125. Covariance with the label (+-0.5): mean of (length * +-0.5) = (10 - 7) / 16 = 0.1875.
    # Variance: (9+1+16+4+1+4+4+4)/8 - 2.125^2 = 5.375 - 4.515625 = 0.859375; r = 0.1875 / (0.5 * sqrt(0.859375)).
    balance = length_balance([(3, 1), (1, 2), (4, 2), (2, 2)], "words")
    assert (balance.pairs, balance.longer) == (4, pytest.approx(2 / 3))
    assert (balance.chosen_mean, balance.rejected_mean) == (2.5, 1.75)
    assert balance.correlation == pytest.approx(0.1875 / (0.5 * 0.859375**0.5))
    assert str(balance) == (
        "length of answers: the chosen one is longer in 67%, words on average 2.5 (chosen) and 1.8 (rejected), "
        "correlation of length and choice +0.40"
    )
    assert not balance.is_strong, "four pairs say nothing"


def test_equal_lengths_have_no_numbers():
    balance = length_balance([(5, 5)] * 30, "tokens")
    assert (balance.longer, balance.correlation, balance.is_strong) == (None, None, False)
    assert "equal in all pairs, tokens on average 5.0" in str(balance)
    assert length_balance([], "words") is None


@pytest.mark.parametrize(
    ("longer", "shorter", "strong", "says"),
    [(14, 6, True, "longer"), (13, 7, False, ""), (6, 14, True, "shorter"), (10, 10, False, "")],
)
def test_a_strong_imbalance(longer, shorter, strong, says):
    # Lengths so uneven in size that the correlation is weak: the share alone decides.
    balance = length_balance([(100 + i * 50, 99 + i * 50) for i in range(longer)]
                             + [(99 + i * 50, 100 + i * 50) for i in range(shorter)], "words")  # fmt: skip
    assert abs(balance.correlation) < 0.1 and balance.is_strong == strong
    if strong:
        assert f"always takes the {says} answer is right in 70% of these pairs" in balance.advice


def test_a_strong_correlation_is_enough():
    balance = length_balance([(100, 1)] * 13 + [(1, 2)] * 7, "words")
    assert balance.longer == 0.65 and balance.correlation > 0.6 and balance.is_strong
