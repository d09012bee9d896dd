"""Numbers of a set of answers of which each reward function judged only a part."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.evaluation.metrics import reward_metrics
from rlhf_ray.rollout.measures import function_means

NAN = math.nan


def test_means_are_over_the_rows_that_a_function_judged():
    by_function = {
        "sums": torch.tensor([1.0, NAN, 0.0, 1.0]),
        "proofs": torch.tensor([NAN, 3.0, NAN, NAN]),
        "code": torch.full((4,), NAN),
    }
    found = reward_metrics(torch.tensor([1.0, 3.0, 0.0, 1.0]), by_function, right="sums")
    assert found == {
        "reward": 1.25, "reward/sums": pytest.approx(2 / 3), "reward/proofs": 3.0, "accuracy": pytest.approx(2 / 3)
    }  # fmt: skip
    assert reward_metrics(torch.tensor([1.0]), {"code": torch.tensor([NAN])}, right="code") == {"reward": 1.0}
    assert function_means(by_function).keys() == {"reward/sums", "reward/proofs"}
