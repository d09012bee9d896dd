from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo.kl import (
    AdaptiveKL,
    FixedKL,
    ScheduledKL,
    kl_estimate,
    kl_loss,
)

ESTIMATORS = ("k1", "k2", "k3", "abs")


def test_values_at_a_log_ratio_of_ln_2():
    logp, ref = torch.tensor([0.0]), torch.tensor([-math.log(2.0)])
    ln2 = math.log(2.0)
    expected = {"k1": ln2, "k2": ln2**2 / 2, "k3": 0.5 - 1 + ln2, "abs": ln2}
    for name, value in expected.items():
        assert kl_estimate(logp, ref, name).item() == pytest.approx(value, abs=1e-7)
    assert kl_estimate(ref, logp, "k3").item() == pytest.approx(2 - 1 - ln2, abs=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_finite_at_any_log_ratio(estimator, log_ratio):
    logp = torch.tensor([log_ratio], requires_grad=True)
    for unbiased in (True, False):
        value = kl_loss(logp, torch.zeros(1), estimator, unbiased_gradient=unbiased)
        (grad,) = torch.autograd.grad(value.sum(), logp)
        assert torch.isfinite(value).all() and torch.isfinite(grad).all()
        if log_ratio == 0.0:
            assert value.item() == 0.0


def test_k3_keeps_pulling_back_beyond_its_bound():
    """A clamp there has gradient 0: the tokens that drifted farthest would be left alone."""
    logp = torch.tensor([-50.0, -9.9, -10.1], requires_grad=True)
    kl_estimate(logp, torch.zeros(3), "k3").sum().backward()
    assert logp.grad[0] == pytest.approx(1 - math.exp(10.0), rel=1e-5)
    assert (logp.grad < -1e4).all()  # lowering the loss raises logp, back to the reference


def test_loss_gradient_at_a_hand_worked_point():
    logp = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-3.0])
    for name in ESTIMATORS:
        (grad,) = torch.autograd.grad(kl_loss(logp, ref, name).sum(), logp)
        assert grad.item() == pytest.approx(2.0)  # d
    own = {"k1": 1.0, "k2": 2.0, "k3": 1 - math.exp(-2.0), "abs": 1.0}
    for name, value in own.items():
        (grad,) = torch.autograd.grad(kl_loss(logp, ref, name, unbiased_gradient=False).sum(), logp)
        assert grad.item() == pytest.approx(value)


def test_unknown_estimator_names_the_choices():
    with pytest.raises(ValueError, match="k1, k2, k3 or abs"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_controller_by_hand():
    kl = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert kl.update(6.0, 100).coef == pytest.approx(0.1)
    assert kl.update(6.6, 100).coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert kl.update(60.0, 100).coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # error clipped at 0.2
    assert kl.update(0.0, 10**9).coef == pytest.approx(0.1 * 0.8)  # never negative
    assert kl.update(math.nan, 100) is kl
    assert kl.coef == 0.1


def test_scheduled_target_moves_and_state_round_trips():
    kl = ScheduledKL(coef=0.1, target=2.0, target_end=6.0, span=100, horizon=100)
    assert kl.target_now == 2.0
    later = kl.update(2.0, 50)
    assert later.target_now == 4.0 and later.coef == pytest.approx(0.1)
    assert later.update(4.0, 500).target_now == 6.0
    for one in (later, FixedKL(0.3), AdaptiveKL(0.1, 6.0)):
        assert type(one)(**one.state_dict()) == one
    assert FixedKL(0.3).update(99.0, 5).coef == 0.3


def test_gradient_for_tokens_of_an_older_policy_is_weighted():
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0 - math.log(3.0), -30.0])  # ratio 3; then one beyond the bound
    kl_loss(logp, torch.tensor([-3.0, -3.0]), "k1", old_BT=old).sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([6.0, 2.0 * math.exp(2.0)]))
