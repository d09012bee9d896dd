from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo.calibration import calibration_error, correlation, histogram, preference_confidence


def test_calibration_error_weighs_the_bins_by_their_size():
    # bin [0.8, 0.9): confidence 0.85, accuracy 2/3; bin [0.5, 0.6): confidence 0.55, accuracy 0; last bin: 1 and 1
    confidence_N = torch.tensor([0.85, 0.85, 0.85, 0.55, 1.0])
    correct_N = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    expected = (3 * abs(2 / 3 - 0.85) + 0.55 + 0.0) / 5
    assert calibration_error(confidence_N, correct_N) == pytest.approx(expected)


def test_a_calibrated_judge_has_no_error():
    assert calibration_error(torch.full((4,), 0.75), torch.tensor([1, 1, 0, 1])) == pytest.approx(0.0, abs=1e-7)


def test_confidence_of_a_preference():
    confidence_N, correct_N = preference_confidence(torch.tensor([math.log(3.0), -math.log(3.0), 0.0]))
    torch.testing.assert_close(confidence_N, torch.tensor([0.75, 0.75, 0.5]).double(), atol=1e-6, rtol=0)
    assert correct_N.tolist() == [1.0, 0.0, 0.5]


def test_correlation():
    length_N = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(torch.tensor([5.0, 7.0, 9.0]), length_N) == pytest.approx(1.0)
    assert correlation(torch.tensor([1.0, 0.0, 1.0]), length_N) == pytest.approx(0.0)
    assert correlation(torch.ones(3), length_N) == 0.0


def test_histograms_share_their_bins():
    edges, (one, other) = histogram([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0, 4.0])], bins=4)
    assert edges == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert (one, other) == ([1, 1, 0, 0], [0, 0, 1, 2])
    assert sum(histogram([torch.ones(3)], bins=2)[1][0]) == 3, "all alike"
