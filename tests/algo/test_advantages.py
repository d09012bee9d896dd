from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo.advantages import (
    MovingBaseline,
    discounted_returns,
    dr_grpo,
    gae,
    grpo,
    informative_groups,
    pass_at_k,
    reinforce,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
)
from rlhf_ray.config.formula_names import ADVANTAGES

# two prompts, their answers interleaved: 1, 2, 3 for prompt 7; 0, 0, 1 for prompt -4
REWARD_B = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 1.0])
GROUP_B = torch.tensor([7, -4, 7, -4, 7, -4])
THIRD = 1.0 / 3.0


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def test_grpo():
    # prompt 7: mean 2, std (n-1) 1. prompt -4: mean 1/3, std sqrt((1/9 + 1/9 + 4/9) / 2) = sqrt(1/3)
    root3 = math.sqrt(3.0)
    expected = [-1.0, -THIRD * root3, 0.0, -THIRD * root3, 1.0, 2 * THIRD * root3]
    close(grpo(REWARD_B, GROUP_B, eps=0.0), expected)
    assert grpo(REWARD_B, GROUP_B)[0].item() == pytest.approx(-1 / 1.0001)


def test_dr_grpo_is_grpo_without_std():
    close(dr_grpo(REWARD_B, GROUP_B), [-1.0, -THIRD, 0.0, -THIRD, 1.0, 2 * THIRD])


def test_rloo():
    # 1 - (2+3)/2, 0 - (0+1)/2, 2 - (1+3)/2, ...
    close(rloo(REWARD_B, GROUP_B), [-1.5, -0.5, 0.0, -0.5, 1.5, 1.0])


def test_reinforce():
    close(reinforce(REWARD_B, GROUP_B), [x - 7 / 6 for x in REWARD_B.tolist()])
    close(reinforce(REWARD_B, GROUP_B, baseline=0.5), [0.5, -0.5, 1.5, -0.5, 2.5, 0.5])


def test_moving_baseline():
    first = MovingBaseline(decay=0.9).update(torch.tensor([2.0, 4.0]))
    assert MovingBaseline().value == 0.0
    assert first.value == pytest.approx(3.0)  # not 0.3: the start at 0 is corrected
    second = first.update(torch.tensor([5.0]))
    assert second.value == pytest.approx((0.9 * 0.1 * 3 + 0.1 * 5) / (1 - 0.81))
    assert MovingBaseline(**second.state_dict()) == second


def test_reinforce_pp_baseline():
    # centred -1 1 | -1 1: batch mean 0, variance 4/3
    reward_B, group_B = torch.tensor([0.0, 2.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1])
    r = math.sqrt(3 / 4)
    close(reinforce_pp_baseline(reward_B, group_B), [-r, r, -r, r])
    # three tokens for the first row, one for the others: mean (-3+1-1+1)/6 = -1/3
    # squares: 3 * 4/9 + 16/9 + 4/9 + 16/9 = 48/9, over 5
    std = math.sqrt(48 / 45)
    close(
        reinforce_pp_baseline(reward_B, group_B, length_B=torch.tensor([3, 1, 1, 1])),
        [-2 * THIRD / std, 4 * THIRD / std, -2 * THIRD / std, 4 * THIRD / std],
    )


def test_remax():
    close(remax(REWARD_B, GROUP_B, baseline_B=torch.full((6,), 0.5)), [0.5, -0.5, 1.5, -0.5, 2.5, 0.5])


def test_pass_at_k_by_listing_the_subsets():
    # rewards 1, 2, 3, k = 2. Subsets {1,2}: 2 adds 1. {1,3}: 3 adds 2. {2,3}: 3 adds 1. n / C(3,2) = 1.
    close(pass_at_k(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), k=2), [3.0, 0.0, 1.0])
    # k = n = 3: only the best adds something, 3 - 2, times n
    close(pass_at_k(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), k=3), [3.0, 0.0, 0.0])
    # two right answers of four, k = 2: a right one helps against each wrong one: 2 of 6 subsets, times 4
    close(pass_at_k(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.int64), k=2), [4 / 3, 0, 4 / 3, 0])


def test_pass_at_k_edge_cases():
    close(pass_at_k(REWARD_B, GROUP_B, k=1), rloo(REWARD_B, GROUP_B).tolist())
    close(pass_at_k(REWARD_B, GROUP_B, k=99), pass_at_k(REWARD_B, GROUP_B, k=3).tolist())
    close(pass_at_k(REWARD_B, torch.arange(6), k=4), [0.0] * 6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp_baseline", "pass_at_k"])
@pytest.mark.parametrize("reward", [0.1, 1e6 + 0.1, -3.3])
def test_equal_rewards_and_single_answers_give_exactly_zero(name, reward):
    equal_B = torch.full((7,), reward)
    group_B = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert ADVANTAGES[name](equal_B, group_B).tolist() == [0.0] * 7
    if name != "reinforce":
        assert ADVANTAGES[name](torch.randn(5), torch.arange(5)).tolist() == [0.0] * 5


def test_informative_groups():
    reward_B = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0, 5.0])
    keep_B = informative_groups(reward_B, torch.tensor([3, 3, 3, 1, 1, 1, 2]))
    assert keep_B.tolist() == [False, False, False, True, True, True, False]


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5, rewards 0 0 4, values 1 2 3
    # delta: 0 + 0.5*2 - 1 = 0; 0 + 0.5*3 - 2 = -0.5; 4 - 3 = 1. A2 = 1; A1 = -0.5 + 0.25 = -0.25; A0 = -0.0625
    on = torch.ones(1, 3, dtype=torch.bool)
    adv_BT, return_BT = gae(torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]]), on, 0.5, 0.5)
    close(adv_BT, [[-0.0625, -0.25, 1.0]])
    close(return_BT, [[0.9375, 1.75, 4.0]])


def test_gae_skips_the_tokens_of_tools():
    """Whatever stands at the tool's tokens, the model's own get what they would get without them."""
    reward_BT = torch.tensor([[0.0, 0.0, 99.0, math.nan, 4.0, 7.0]])
    value_BT = torch.tensor([[1.0, 2.0, 50.0, math.inf, 3.0, 8.0]])
    mask_BT = torch.tensor([[True, True, False, False, True, False]])
    adv_BT, return_BT = gae(reward_BT, value_BT, mask_BT, 0.5, 0.5)
    close(adv_BT, [[-0.0625, -0.25, 0.0, 0.0, 1.0, 0.0]])
    close(return_BT, [[0.9375, 1.75, 0.0, 0.0, 4.0, 0.0]])


def test_gae_limits_and_bootstrap():
    reward_BT = torch.tensor([[1.0, 2.0, 3.0]])
    value_BT = torch.tensor([[0.5, 0.25, 0.125]])
    on = torch.ones(1, 3, dtype=torch.bool)
    # lambda 1: return is the sum of rewards; lambda 0: one-step errors
    close(gae(reward_BT, value_BT, on, 1.0, 1.0)[1], [[6.0, 5.0, 3.0]])
    close(gae(reward_BT, value_BT, on, 1.0, 0.0)[0], [[0.75, 1.875, 2.875]])
    # an episode cut off in a state of value 10
    close(gae(reward_BT, value_BT, on, 0.5, 1.0, bootstrap_B=torch.tensor([10.0]))[1], [[4.0, 6.0, 8.0]])


def test_reinforce_pp():
    reward_BT = torch.tensor([[0.0, 5.0, 2.0], [0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[True, False, True], [True, True, False]])
    # returns with gamma 1/2: 0 + 1, -, 2 (the 5 stands at a tool's token) and 0, 0
    close(discounted_returns(reward_BT, mask_BT, 0.5), [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    adv_BT, return_BT = reinforce_pp(reward_BT, mask_BT, 0.5)
    std = math.sqrt((0.0625 + 1.5625 + 2 * 0.5625) / 3)
    close(adv_BT, [[0.25 / std, 0.0, 1.25 / std], [-0.75 / std, -0.75 / std, 0.0]])
    close(return_BT, [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
