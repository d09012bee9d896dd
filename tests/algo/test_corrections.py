from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo.corrections import importance_weights, mismatch_stats, mismatch_summary
from rlhf_ray.algo.policy_losses import combine_stats

# ratios 4, 1/2 and a token that does not count; then one of 1/8
RATIO_BT = torch.tensor([[4.0, 0.5, 100.0], [0.125, 1.0, 1.0]])
MASK_BT = torch.tensor([[True, True, False], [True, False, False]])
ZERO_BT = torch.zeros(2, 3)
ROOT2 = math.sqrt(2.0)


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "none", [[4.0, 0.5, 0], [0.125, 0, 0]]),
        ("token", "truncate", [[3.0, 0.5, 0], [0.125, 0, 0]]),
        ("token", "mask", [[0.0, 0.5, 0], [0.0, 0, 0]]),
        ("sequence", "none", [[2.0, 2.0, 0], [0.125, 0, 0]]),
        ("sequence", "truncate", [[2.0, 2.0, 0], [0.125, 0, 0]]),
        ("sequence", "mask", [[2.0, 2.0, 0], [0.0, 0, 0]]),
        ("geometric", "none", [[ROOT2, ROOT2, 0], [0.125, 0, 0]]),
        ("geometric", "mask", [[ROOT2, ROOT2, 0], [0.0, 0, 0]]),
    ],
)
def test_weights_by_hand(level, mode, expected):
    logp_BT = RATIO_BT.log().requires_grad_()
    weight_BT = importance_weights(logp_BT, ZERO_BT, MASK_BT, level=level, mode=mode, low=0.25, high=3.0)
    torch.testing.assert_close(weight_BT, torch.tensor(expected))
    assert not weight_BT.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_same_policy_gives_exactly_one_and_extremes_stay_finite(level):
    logp_BT = torch.randn(2, 3)
    for mode in ("none", "truncate", "mask"):
        weight_BT = importance_weights(logp_BT, logp_BT.clone(), MASK_BT, level=level, mode=mode)
        assert torch.equal(weight_BT, MASK_BT.float())
        for gap in (-50.0, 50.0):
            assert torch.isfinite(importance_weights(logp_BT + gap, logp_BT, MASK_BT, level=level, mode=mode)).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="token, sequence, geometric"):
        importance_weights(ZERO_BT, ZERO_BT, MASK_BT, level="word")
    with pytest.raises(ValueError, match="truncate, mask or none"):
        importance_weights(ZERO_BT, ZERO_BT, MASK_BT, mode="clip")


def test_mismatch_by_hand_and_in_parts():
    logp_BT = RATIO_BT.log()
    stats = mismatch_stats(logp_BT, ZERO_BT, MASK_BT)
    summary = mismatch_summary(stats)
    ln2 = math.log(2.0)
    assert summary["kl"] == pytest.approx(((4 - 1 - 2 * ln2) + (0.5 - 1 + ln2) + (0.125 - 1 + 3 * ln2)) / 3)
    assert summary["absdiff_mean"] == pytest.approx(2 * ln2)
    assert summary["absdiff_max"] == pytest.approx(3 * ln2)
    assert summary["ess"] == pytest.approx(4.625**2 / (3 * (16 + 0.25 + 1 / 64)))
    parts = combine_stats(mismatch_stats(logp_BT[b : b + 1], ZERO_BT[:1], MASK_BT[b : b + 1]) for b in range(2))
    for name, value in mismatch_summary(parts).items():
        assert value == pytest.approx(summary[name])


def test_identical_policies_do_not_mismatch():
    logp_BT = torch.randn(2, 3)
    summary = mismatch_summary(mismatch_stats(logp_BT, logp_BT.clone(), MASK_BT))
    assert summary == {"kl": 0.0, "absdiff_mean": 0.0, "absdiff_max": 0.0, "ess": 1.0}
    assert mismatch_summary(mismatch_stats(logp_BT, logp_BT, torch.zeros_like(MASK_BT)))["ess"] == 1.0


def test_an_alarm_sees_the_true_distance():
    assert mismatch_stats(ZERO_BT - 50.0, ZERO_BT, MASK_BT)["absdiff_max"] == 50.0
