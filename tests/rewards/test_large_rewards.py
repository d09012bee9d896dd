"""Rewards whose squares overflow float32 would have advantages of exactly 0: they are failures of their rows."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.algo.advantages import grpo
from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.load import parse_config
from rlhf_ray.config.reward_server import RewardServerConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet
from rlhf_ray.rewards.failures import FailurePolicy


def judge(value, weight=1.0, name="mine", **policy):
    def f(completions):
        return [value if text == "big" else 1.0 for text in completions]

    return RewardFunction(name, f, weight, policy=FailurePolicy(**policy))


def score(*functions):
    return RewardSet(functions).score(["p", "p", "q"], ["big", "c", "d"], [[1]] * 3, [{}] * 3)


def test_at_the_bound_the_arithmetic_still_holds():
    """Two groups of the largest rewards, with a reward model's beside them; their squares over 2^30 tokens."""
    largest = 2 * LARGEST_REWARD
    reward_B = torch.tensor([largest, -largest] * 2)
    advantage_B = grpo(reward_B, torch.tensor([0, 0, 1, 1]))
    assert torch.allclose(advantage_B, torch.tensor([0.7071, -0.7071] * 2), atol=1e-4)
    squares = (torch.tensor(2 * largest) ** 2) * 2**30
    assert squares.isfinite() and not (100 * squares).isfinite()


@pytest.mark.parametrize("value", [1e15, -1e20, 1e38, 1e39, 10**400])
def test_a_large_score_is_a_failure_of_its_row(value):
    with pytest.raises(RewardError, match="reward 'mine' gave .* for row 0; .*scale it"):
        score(judge(value))
    rewards = score(judge(value, on_failure="drop_group"))
    assert rewards.keep == [False, False, True] and rewards.total[2] == 1.0
    assert score(judge(value, on_failure="default", default_score=-5.0)).total == [-5.0, 1.0, 1.0]


def test_the_weight_counts():
    assert score(judge(1e14)).total[0] == 1e14 and score(judge(1e15, 0.1, on_failure="drop_group")).keep[0] is False
    with pytest.raises(RewardError, match=r"gave 1e\+12 \(1e\+15 with its weight, in a sum of 1e\+15\) for row 0"):
        score(judge(1e12, 1e3))


def test_the_sum_counts_and_the_largest_part_is_blamed():
    small, large = judge(4e13, name="small"), judge(7e13, name="large", on_failure="drop_group")
    rewards = score(small, large)
    assert rewards.keep == [False, False, True]
    assert [event["reward"] for event in rewards.events] == ["large"]
    opposite = score(judge(-7e13, name="minus"), judge(7e13, name="plus"))
    assert opposite.total[0] == 0.0


@pytest.mark.parametrize("settings, model, says", [
    ({"rewards": [{"function": "sentiment", "on_failure": "default", "default_score": 1e15}]}, RewardServerConfig,
     "default_score"),
    ({"rewards": [{"function": "sentiment", "on_failure": "default", "default_score": 1e10, "weight": 1e5}]},
     RewardServerConfig, "default_score=1e.10 times rewards.0.weight=100000 is beyond 1e.14"),
    ({"algorithm": {"reward_clip": 1e20}}, RunConfig, "reward_clip"),
])  # fmt: skip
def test_settings_beyond_it_are_refused(settings, model, says):
    with pytest.raises(ConfigError, match=says):
        parse_config(settings, model, source="x.yaml")
