"""Equality with OpenRLHF 0.11.2 (requirements/test-parity.txt), by running its functions.

`import openrlhf.models` fails without flash-attn, which its model class and its ring attention want and its formulas
do not. So those two are placeholders here; `models/loss.py`, `models/utils.py` and
`trainer/ppo_utils/experience_maker.py`, which hold the formulas, are its own files, unchanged.
"""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec

import pytest
import torch

from rlhf_ray.algo import advantages, kl
from rlhf_ray.algo.aggregation import loss_totals, loss_weights
from rlhf_ray.algo.corrections import importance_weights
from rlhf_ray.algo.policy_losses import clipped_loss, gspo_loss
from rlhf_ray.algo.preference import bradley_terry_loss, dpo_loss
from rlhf_ray.algo.shaping import token_rewards
from rlhf_ray.algo.value_losses import clipped_value_loss

pytestmark = pytest.mark.slow  # importing OpenRLHF (and DeepSpeed and Ray, which it imports) takes ten seconds

TIGHT = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(scope="module")
def openrlhf():
    spec = find_spec("openrlhf")
    if spec is None:
        pytest.skip("openrlhf is not installed")
    models = types.ModuleType("openrlhf.models")
    models.__path__ = [f"{spec.submodule_search_locations[0]}/models"]
    models.Actor = models.get_llm_for_sequence_regression = object
    attention = types.ModuleType("openrlhf.models.ring_attn_utils")
    attention.__dict__["__getattr__"] = lambda name: None
    sys.modules |= {"openrlhf.models": models, "openrlhf.models.ring_attn_utils": attention}
    pytest.importorskip("deepspeed", exc_type=ImportError)
    from openrlhf.models import loss, utils

    return types.SimpleNamespace(loss=loss, utils=utils)


@pytest.fixture(scope="module")
def experience_maker(openrlhf):
    module = "openrlhf.trainer.ppo_utils.experience_maker"
    return pytest.importorskip(module, exc_type=ImportError).RemoteExperienceMaker


def mean_loss(loss_BT: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    tokens, sequences = loss_totals(mask_BT).tolist()
    return (loss_BT * loss_weights(mask_BT, mode, total_tokens=tokens, total_sequences=sequences)).sum()


def same_loss(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)
    (our_grad,) = torch.autograd.grad(ours, leaf)
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    assert our_grad.abs().max() > 0
    torch.testing.assert_close(our_grad, their_grad, **TIGHT)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clipped_loss(openrlhf, rollout, token_level, dual_clip):
    theirs = openrlhf.loss.PolicyLoss(0.2, 0.28, dual_clip=dual_clip, token_level_loss=token_level)
    expected = theirs(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT.double())[0]
    loss_BT = clipped_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT,
                           clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)  # fmt: skip
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "token_mean" if token_level else "seq_mean"), expected,
              rollout.logp_BT)  # fmt: skip


def test_gspo(openrlhf, rollout):
    theirs = openrlhf.loss.PolicyLoss(0.05, 0.1, policy_loss_type="gspo")
    expected = theirs(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT.double())[0]
    loss_BT = gspo_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, rollout.mask_BT, clip_low=0.05, clip_high=0.1)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "seq_mean"), expected, rollout.logp_BT)


def test_masked_importance_correction(openrlhf, rollout):
    theirs = openrlhf.loss.PolicyLoss(is_correction_level="token", is_correction_threshold=[0.7, 1.3])
    mask_BT = rollout.mask_BT
    expected = theirs(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, mask_BT.double(), rollout.ref_BT)[0]
    weight_BT = importance_weights(rollout.old_BT, rollout.ref_BT, mask_BT, mode="mask", low=0.7, high=1.3)
    loss_BT = clipped_loss(rollout.logp_BT, rollout.old_BT, rollout.adv_BT, mask_BT) * weight_BT
    same_loss(mean_loss(loss_BT, mask_BT, "token_mean"), expected, rollout.logp_BT)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(openrlhf, rollout, clip):
    theirs = openrlhf.loss.ValueLoss(clip)
    expected = theirs(rollout.value_BT, rollout.old_value_BT, rollout.return_BT, rollout.mask_BT.double())
    loss_BT = clipped_value_loss(rollout.value_BT, rollout.old_value_BT, rollout.return_BT, clip=clip)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "token_mean"), expected, rollout.value_BT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_and_its_gradient(openrlhf, rollout, estimator, unbiased):
    logp_BT = rollout.logp_BT.detach().float().requires_grad_()  # OpenRLHF computes it in float32
    args = (logp_BT, rollout.ref_BT.float())
    expected_BT = openrlhf.utils.compute_approx_kl(
        *args, rollout.old_BT.float() if unbiased else None, estimator, unbiased_gradient=unbiased
    )
    ours_BT = kl.kl_loss(
        *args, estimator, unbiased_gradient=unbiased, old_BT=rollout.old_BT.float() if unbiased else None
    )
    torch.testing.assert_close(ours_BT, expected_BT, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x.sum(), logp_BT)[0] for x in (ours_BT, expected_BT)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_score_and_kl_as_token_rewards(openrlhf, rollout):
    mask_BT = rollout.mask_BT
    expected_BT = openrlhf.utils.compute_reward(rollout.reward_B, 0.1, rollout.ref_BT, mask_BT)
    ours_BT = token_rewards(rollout.reward_B, rollout.ref_BT, mask_BT, 0.1)
    torch.testing.assert_close(ours_BT, expected_BT * mask_BT, **TIGHT)


def test_dpo_and_reward_model_losses(openrlhf):
    args = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    for theirs, ours in (
        (openrlhf.loss.DPOLoss(0.3), {}),
        (openrlhf.loss.DPOLoss(0.3, label_smoothing=0.2), {"label_smoothing": 0.2}),
        (openrlhf.loss.DPOLoss(0.3, ipo=True), {"kind": "ipo"}),
    ):
        expected, *expected_rewards = theirs(*args)
        loss_B, *rewards = dpo_loss(*args, 0.3, **ours)
        same_loss(loss_B.mean(), expected, args[0])
        for a, b in zip(rewards, expected_rewards, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)
    margin_B = torch.rand(6).double()
    expected = openrlhf.loss.PairWiseLoss()(args[0], args[1], margin_B)
    same_loss(bradley_terry_loss(args[0], args[1], margin_B).mean(), expected, args[0])


def test_gae_and_returns_without_tool_tokens(experience_maker, rollout):
    mask_BT, reward_BT, value_BT = rollout.mask_BT, rollout.return_BT, rollout.value_BT.detach()
    expected_BT, expected_return_BT = experience_maker.get_advantages_and_returns(
        None, value_BT, reward_BT, mask_BT, 0.97, 0.9
    )
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, mask_BT, 0.97, 0.9)
    torch.testing.assert_close(adv_BT, expected_BT, **TIGHT)
    torch.testing.assert_close(return_BT, expected_return_BT, **TIGHT)
    cumulative_BT = experience_maker.get_cumulative_returns(None, reward_BT, mask_BT, 0.9)
    torch.testing.assert_close(advantages.discounted_returns(reward_BT, mask_BT, 0.9), cumulative_BT, **TIGHT)


# ---- where we differ on purpose ---------------------------------------------------------------------------


def test_openrlhf_values_the_tools_tokens_at_zero(experience_maker):
    """The value 5 before the tool's text meets a "next value" of 0 there, so a perfect critic gets an advantage."""
    reward_BT = torch.tensor([[0.0, 0.0, 5.0]])
    value_BT = torch.full((1, 3), 5.0)
    mask_BT = torch.tensor([[True, False, True]])
    theirs_BT, _ = experience_maker.get_advantages_and_returns(None, value_BT, reward_BT, mask_BT, 1.0, 0.0)
    assert theirs_BT[0, 0] == -5.0
    assert advantages.gae(reward_BT, value_BT, mask_BT, 1.0, 0.0)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_openrlhf_discounts_across_the_tools_tokens(experience_maker):
    reward_BT, mask_BT = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[True, False, True]])
    assert experience_maker.get_cumulative_returns(None, reward_BT, mask_BT, 0.5)[0, 0] == 1.0
    assert advantages.discounted_returns(reward_BT, mask_BT, 0.5)[0, 0] == 2.0
