from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlhf_ray.algo.policy_losses import (
    cispo_loss,
    clipped_loss,
    combine_stats,
    gspo_loss,
    past_clip,
    policy_gradient_loss,
    ratio_stats,
)
from rlhf_ray.config.formula_names import POLICY_LOSSES

LN2 = math.log(2.0)
ON = torch.ones(1, 1, dtype=torch.bool)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def one(x: float) -> torch.Tensor:
    return torch.tensor([[x]])


@pytest.mark.parametrize(
    ("ratio", "adv", "loss", "grad"),
    [
        (2.0, 1.0, -1.2, 0.0),  # clipped above
        (2.0, -1.0, 2.0, 2.0),  # pessimistic: not clipped
        (0.5, 1.0, -0.5, -0.5),  # pessimistic: not clipped
        (0.5, -1.0, 0.8, 0.0),  # clipped below
        (1.0, 3.0, -3.0, -3.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clipped_loss_by_hand(ratio, adv, loss, grad):
    logp = one(math.log(ratio)).requires_grad_()
    value = clipped_loss(logp, one(0.0), one(adv), ON)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logp.grad.item() == pytest.approx(grad, abs=1e-6)


def test_asymmetric_clip_leaves_more_room_above():
    assert clipped_loss(one(LN2), one(0.0), one(1.0), ON, clip_high=0.28).item() == pytest.approx(-1.28)
    assert clipped_loss(one(-LN2), one(0.0), one(-1.0), ON, clip_high=0.28).item() == pytest.approx(0.8)


def test_dual_clip_bounds_only_negative_advantages():
    far = one(math.log(100.0)).requires_grad_()
    loss = clipped_loss(far, one(0.0), one(-2.0), ON, dual_clip=3.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(6.0) and far.grad.item() == 0.0
    assert clipped_loss(one(math.log(100.0)), one(0.0), one(2.0), ON, dual_clip=3.0).item() == pytest.approx(-2.4)


def test_gspo_uses_the_geometric_mean_of_the_ratios():
    # ratios 2 and 8: s = 4; two tokens and one that does not count
    logp = torch.tensor([[LN2, 3 * LN2, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    adv = torch.full((1, 3), -1.0)
    loss = gspo_loss(logp, torch.zeros(1, 3), adv, mask)
    torch.testing.assert_close(loss.detach(), torch.tensor([[4.0, 4.0, 0.0]]))
    loss.sum().div(2).backward()  # seq_mean: d s / d logp_t = s / |y|
    torch.testing.assert_close(logp.grad, torch.tensor([[2.0, 2.0, 0.0]]))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    logp = one(math.log(10.0)).requires_grad_()
    loss = cispo_loss(logp, one(0.0), one(2.0), ON, clip_high=4.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-5.0 * 2.0 * math.log(10.0))
    assert logp.grad.item() == pytest.approx(-10.0)


def test_policy_gradient_loss():
    logp = one(-0.5).requires_grad_()
    loss = policy_gradient_loss(logp, one(9.0), one(3.0), ON)
    loss.sum().backward()
    assert loss.item() == 1.5 and logp.grad.item() == -3.0


@pytest.mark.parametrize("loss", [clipped_loss, gspo_loss, cispo_loss, policy_gradient_loss])
def test_on_policy_all_have_the_reinforce_gradient(loss):
    torch.manual_seed(0)
    logp = torch.randn(2, 3, requires_grad=True)
    adv = torch.randn(2, 1).expand(2, 3)
    loss(logp, logp.detach(), adv, torch.ones(2, 3, dtype=torch.bool)).sum().backward()
    torch.testing.assert_close(logp.grad, -adv)


@pytest.mark.parametrize("loss", [clipped_loss, gspo_loss, cispo_loss, policy_gradient_loss])
def test_nothing_leaks_from_outside_the_mask(loss):
    logp = torch.tensor([[-1.0, -math.inf, math.nan]], requires_grad=True)
    old = torch.tensor([[-1.0, math.nan, -math.inf]])
    value = loss(logp, old, torch.tensor([[1.0, math.nan, math.inf]]), torch.tensor([[True, False, False]]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logp.grad).all() and logp.grad[0, 1:].tolist() == [0.0, 0.0]


def test_equal_policies_have_ratio_exactly_1_and_kl_exactly_0():
    torch.manual_seed(0)
    logp = 5 * torch.randn(4, 9)
    stats = ratio_stats(logp, logp.clone(), torch.ones(4, 9, dtype=torch.bool), torch.randn(4, 9), past_clip)
    assert {k: v.item() for k, v in stats.items()} == {
        "count": 36.0, "ratio_sum": 36.0, "ratio_max": 1.0, "clipped_sum": 0.0, "approx_kl_sum": 0.0,
    }  # fmt: skip


def test_ratio_stats_by_hand_and_in_parts():
    ratio = torch.tensor([[2.0, 2.0], [0.5, 0.5], [1.1, 7.0]])
    adv = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    args = (ratio.log(), torch.zeros(3, 2), mask)
    whole = ratio_stats(*args, adv, past_clip)
    assert whole["count"] == 5 and whole["clipped_sum"] == 2  # 2 with adv 1, 0.5 with adv -1
    assert whole["ratio_sum"].item() == pytest.approx(6.1) and whole["ratio_max"].item() == pytest.approx(2.0)
    expected = 2 * (1 - LN2) + 2 * (-0.5 + LN2) + 0.1 - math.log(1.1)
    assert whole["approx_kl_sum"].item() == pytest.approx(expected, abs=1e-6)
    parts = combine_stats(ratio_stats(*(a[b : b + 1] for a in args), adv[b : b + 1], past_clip) for b in range(3))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_sequence_ratio_stats_see_what_gspo_clips():
    logp = torch.tensor([[LN2, -LN2]])  # each token is far, the sequence is not
    clips = partial(past_clip, clip_low=0.1, clip_high=0.1)
    data = logp, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2)
    stats = ratio_stats(*data, clips, of_answers=True)
    assert stats["ratio_max"] == 1.0 and stats["clipped_sum"] == 0.0


@pytest.mark.parametrize(("name", "options", "clipped"), [
    ("clipped", CLIP, [True, False, False, False, True]),
    ("gspo", CLIP, [True, False, False, False, True]),
    ("clipped", {**CLIP, "dual_clip": 3.0}, [True, False, False, True, True]),
    ("cispo", CLIP, [True, False, False, True, True]),
    ("policy_gradient", {}, [False] * 5),
])  # fmt: skip
def test_clipped_tokens_are_those_of_the_loss(name, options, clipped):
    """Checked against the losses themselves: a clipped token has no gradient, or (CISPO) not its ratio as weight."""
    ratio = torch.tensor([[2.0, 1.1, 2.0, 6.0, 0.5]])
    adv = torch.tensor([[1.0, 1.0, 0.0, -1.0, -1.0]])
    mask, old = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5)
    logp = ratio.log().requires_grad_()
    loss = POLICY_LOSSES[name]
    rows = (x.transpose(0, 1) for x in (logp, old, adv, mask))  # one token a row: its ratio is the answer's, too
    loss(*rows, **options).sum().backward()
    weight = torch.ones(1, 5) if name == "policy_gradient" else ratio
    off = (logp.grad - -weight * adv).abs() > 1e-5
    assert off[0].tolist() == clipped
    for i, one in enumerate(clipped):
        part = (x[:, i : i + 1] for x in (logp, old, mask, adv))
        clips = partial(loss.clips_function, **options)
        assert ratio_stats(*part, clips, of_answers=loss.of_answers)["clipped_sum"] == one
