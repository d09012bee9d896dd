from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo.preference import (
    bradley_terry_loss,
    dpo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    ranked_loss,
    simpo_loss,
)


def test_bradley_terry():
    # sigmoid(ln 3) = 3/4
    loss_B = bradley_terry_loss(torch.tensor([math.log(3.0), 0.0]), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(loss_B, torch.tensor([math.log(4 / 3), math.log(2.0)]))
    with_margin = bradley_terry_loss(torch.tensor(math.log(9.0)), torch.tensor(0.0), math.log(3.0))
    assert with_margin.item() == pytest.approx(math.log(4 / 3))
    assert torch.isfinite(bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]))).all()


def test_ranking_is_the_mean_over_its_pairs():
    ln3 = math.log(3.0)
    score_BK = torch.tensor([[2 * ln3, ln3, 0.0], [0.0, 5.0, 5.0]])
    rank_BK = torch.tensor([[0, 1, 2], [1, 0, -1]])  # the second row has two answers
    expected = [(2 * math.log(4 / 3) + math.log(10 / 9)) / 3, math.log1p(math.exp(-5.0))]
    torch.testing.assert_close(ranked_loss(score_BK, rank_BK), torch.tensor(expected))
    assert ranked_loss(score_BK, torch.zeros_like(rank_BK)).tolist() == [0.0, 0.0]  # all tied: no pair


def test_dpo_sigmoid_and_rewards():
    # h = (-1 + 2) - (-5 + 4) = 2, beta h = 1
    chosen = torch.tensor([-1.0], requires_grad=True)
    loss, up, down = dpo_loss(chosen, torch.tensor([-5.0]), torch.tensor([-2.0]), torch.tensor([-4.0]), 0.5)
    loss.sum().backward()
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert loss.item() == pytest.approx(-math.log(sigmoid))
    assert chosen.grad.item() == pytest.approx(-0.5 * (1 - sigmoid))
    assert (up.item(), down.item()) == pytest.approx((0.5, -0.5))
    assert not up.requires_grad


def test_dpo_variants():
    args = [torch.tensor([x]) for x in (-1.0, -5.0, -2.0, -4.0)]
    sigmoid = 1 / (1 + math.exp(-1.0))
    smooth = dpo_loss(*args, 0.5, label_smoothing=0.1)[0].item()
    assert smooth == pytest.approx(-0.9 * math.log(sigmoid) - 0.1 * math.log(1 - sigmoid))
    assert dpo_loss(*args, 0.5, kind="ipo")[0].item() == pytest.approx((2 - 1) ** 2)
    nll = dpo_loss(*args, 0.5, nll_weight=2.0, chosen_length_B=torch.tensor([4]))[0].item()
    assert nll == pytest.approx(-math.log(sigmoid) + 2.0 * 1.0 / 4)
    with pytest.raises(ValueError, match="sigmoid or ipo"):
        dpo_loss(*args, kind="hinge")


def test_a_policy_equal_to_its_reference_starts_at_ln_2():
    logp_B = torch.randn(5)
    loss_B, up_B, down_B = dpo_loss(logp_B, -logp_B, logp_B, -logp_B)
    torch.testing.assert_close(loss_B, torch.full((5,), math.log(2.0)))
    assert up_B.abs().max() == 0.0 and down_B.abs().max() == 0.0


def test_simpo_wants_a_margin_between_means():
    # beta (-1 + 2) - gamma = 2 - 1 = 1
    chosen = torch.tensor([-1.0], requires_grad=True)
    loss = simpo_loss(chosen, torch.tensor([-2.0]), 2.0, gamma=1.0)
    loss.sum().backward()
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert loss.item() == pytest.approx(-math.log(sigmoid))
    assert chosen.grad.item() == pytest.approx(-2.0 * (1 - sigmoid))


def test_odds_of_probabilities():
    # odds(3/4) = 3, odds(1/2) = 1, odds(1/10) = 1/9
    logp = torch.tensor([0.75, 0.5, 0.1], dtype=torch.float64).log()
    torch.testing.assert_close(log_odds(logp), torch.tensor([3.0, 1.0, 1 / 9], dtype=torch.float64).log())
    ends = torch.tensor([0.0, -1e-30, -200.0], requires_grad=True)
    log_odds(ends).sum().backward()
    assert torch.isfinite(log_odds(ends)).all() and torch.isfinite(ends.grad).all()
    assert log_odds(ends)[2].item() == pytest.approx(-200.0), "odds of what is improbable are its probability"


def test_orpo_adds_the_odds_ratio_to_the_supervised_loss():
    # odds ratio (3/4)/(1/4) : (1/2)/(1/2) = 3, and sigmoid(ln 3) = 3/4
    chosen, rejected = torch.tensor([math.log(0.75)]), torch.tensor([math.log(0.5)])
    assert orpo_loss(chosen, rejected, 0.1).item() == pytest.approx(-math.log(0.75) - 0.1 * math.log(0.75))


def test_kto_pulls_good_answers_over_the_kl_and_bad_ones_below():
    # r = 3 and -1, z = 1: beta (r - z) = 1 for the good one, beta (z - r) = 1 for the bad one
    policy = torch.tensor([-2.0, -6.0], requires_grad=True)
    args = (torch.tensor([-5.0, -5.0]), torch.tensor([1, 0]))
    loss_B, reward_B = kto_loss(policy, *args, 1.0, 0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss_B.sum().backward()
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert loss_B.tolist() == pytest.approx([2 * (1 - sigmoid), 3 * (1 - sigmoid)])
    slope = 0.5 * sigmoid * (1 - sigmoid)
    assert policy.grad.tolist() == pytest.approx([-2 * slope, 3 * slope])
    assert reward_B.tolist() == [1.5, -0.5] and not reward_B.requires_grad
    below_B, _ = kto_loss(policy.detach(), *args, -7.0, 0.5)
    zero_B, _ = kto_loss(policy.detach(), *args, 0.0, 0.5)
    assert below_B.tolist() == zero_B.tolist(), "an estimate below 0 is noise: no KL is"
