from __future__ import annotations

import pytest
import torch

from rlhf_ray.algo.shaping import (
    MomentsBySource,
    RunningMoments,
    clip_reward,
    length_penalty,
    normalize_per_group,
    overlong_penalty,
    repetition_penalty,
    token_rewards,
)


def test_token_rewards_put_the_score_on_the_last_token_of_the_answer():
    kl_BT = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    mask_BT = torch.tensor([[False, True, False, True, False], [False] * 5])
    reward_BT = token_rewards(torch.tensor([5.0, 7.0]), kl_BT, mask_BT, 0.1)
    torch.testing.assert_close(reward_BT, torch.tensor([[0.0, -0.1, 0.0, 4.8, 0.0], [0.0] * 5]))


def test_overlong_penalty():
    length_B = torch.tensor([10, 80, 90, 100, 200])
    assert overlong_penalty(length_B, 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer=0"):
        overlong_penalty(length_B, 100, 0)


def test_length_and_repetition_penalties():
    assert length_penalty(torch.tensor([5, 8]), 6, 0.5).tolist() == [0.0, -1.0]
    # 1 2 1 2 1: bigrams 12 21 12 21, two of four are new
    penalty_B = repetition_penalty([[1, 2, 1, 2, 1], [1, 2, 3, 4], [1], []], n=2, weight=2.0)
    assert penalty_B.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_clip_and_per_group():
    assert clip_reward(torch.tensor([-9.0, 0.5, 9.0]), -1.0, 1.0).tolist() == [-1.0, 0.5, 1.0]
    normal_B = normalize_per_group(torch.tensor([1.0, 3.0, 7.0, 7.0]), torch.tensor([0, 0, 1, 1]), eps=0.0)
    torch.testing.assert_close(normal_B[:2], torch.tensor([-(0.5**0.5), 0.5**0.5]))
    assert normalize_per_group(torch.tensor([7.0, 7.0]), torch.tensor([1, 1])).tolist() == [0.0, 0.0]


def test_running_moments_equal_those_of_everything_seen():
    all_B = torch.tensor([1.0, 4.0, -2.0, 8.0, 3.0])
    moments = RunningMoments().update(all_B[:2]).update(all_B[2:3]).update(all_B[:0]).update(all_B[3:])
    assert moments.count == 5
    assert moments.mean == pytest.approx(all_B.mean().item())
    assert moments.std == pytest.approx(all_B.std().item())
    torch.testing.assert_close(moments.normalize(all_B), (all_B - all_B.mean()) / all_B.std())
    torch.testing.assert_close(moments.normalize(all_B, center=False), all_B / all_B.std())
    assert RunningMoments(**moments.state_dict()) == moments
    assert RunningMoments().std == 1.0


def test_equal_rewards_have_no_scale():
    same = RunningMoments().update(torch.full((3,), 5.0))
    assert same.std == 0 and same.normalize(torch.tensor([5.0, 7.0])).tolist() == [0.0, 2.0]


def test_each_source_has_its_own_scale():
    reward_B, source_B = torch.tensor([0.0, 100.0, 2.0, 300.0]), ["easy", "hard", "easy", "hard"]
    moments = MomentsBySource().update(reward_B, source_B)
    r = 0.5**0.5
    torch.testing.assert_close(moments.normalize(reward_B, source_B), torch.tensor([-r, -r, r, r]))
    assert MomentsBySource.from_state(moments.state_dict()) == moments
    assert moments.normalize(torch.tensor([3.0]), ["new"]).tolist() == pytest.approx([3.0])
