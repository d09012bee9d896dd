"""Equality with verl 0.9.1 (requirements/test-parity.txt), by running its functions; and where we differ, the proof."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from rlhf_ray.algo import advantages, kl, policy_losses
from rlhf_ray.algo.aggregation import loss_totals, loss_weights, masked_whiten
from rlhf_ray.algo.corrections import importance_weights
from rlhf_ray.algo.logprobs import token_entropy, token_logprobs
from rlhf_ray.algo.value_losses import clipped_value_loss

pytestmark = pytest.mark.slow  # importing verl takes five seconds

TIGHT = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(scope="module")
def verl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def corrections_of_verl(verl):
    return pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)


def at_end(reward_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """verl takes the scalar reward at the last token."""
    last_B = mask_BT.long().cumsum(1).argmax(1)
    return torch.zeros(mask_BT.shape, dtype=reward_B.dtype).scatter(1, last_B[:, None], reward_B[:, None])


def same_loss(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)
    (our_grad,) = torch.autograd.grad(ours, leaf)
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    assert our_grad.abs().max() > 0
    torch.testing.assert_close(our_grad, their_grad, **TIGHT)


def mean_loss(loss_BT: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    tokens, sequences = loss_totals(mask_BT).tolist()
    weight_BT = loss_weights(mask_BT, mode, total_tokens=tokens, total_sequences=sequences, constant=50)
    return (loss_BT * weight_BT).sum()


@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda r, g: advantages.grpo(r, g, eps=1e-6), lambda v: v.compute_grpo_outcome_advantage),
    (advantages.dr_grpo, lambda v: lambda *a: v.compute_grpo_outcome_advantage(*a, norm_adv_by_std_in_grpo=False)),
    (advantages.rloo, lambda v: v.compute_rloo_outcome_advantage),
    (advantages.rloo, lambda v: v.compute_rloo_vectorized_outcome_advantage),
])  # fmt: skip
def test_group_advantages(verl, rollout, ours, theirs):
    mask_BT = rollout.mask_BT
    adv_BT, _ = theirs(verl)(at_end(rollout.reward_B, mask_BT), mask_BT.double(), rollout.group_B.numpy())
    torch.testing.assert_close(ours(rollout.reward_B, rollout.group_B)[:, None] * mask_BT, adv_BT, **TIGHT)


def test_reinforce_pp_baseline(verl, rollout):
    mask_BT = rollout.mask_BT
    adv_BT, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(
        at_end(rollout.reward_B, mask_BT), mask_BT.double(), rollout.group_B.numpy()
    )
    adv_B = advantages.reinforce_pp_baseline(rollout.reward_B, rollout.group_B, length_B=mask_BT.sum(1))
    torch.testing.assert_close(adv_B[:, None] * mask_BT, adv_BT, **TIGHT)


def test_reinforce_pp_with_discount_and_tool_tokens(verl, rollout):
    reward_BT = rollout.return_BT
    theirs = verl.compute_reinforce_plus_plus_outcome_advantage(
        reward_BT, rollout.holes_BT.double(), config=verl.AlgoConfig(gamma=0.9)
    )
    ours = advantages.reinforce_pp(reward_BT, rollout.holes_BT, 0.9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_remax(verl, rollout):
    baseline_B = rollout.adv_B
    adv_BT, _ = verl.compute_remax_outcome_advantage(
        at_end(rollout.reward_B, rollout.mask_BT), baseline_B, rollout.mask_BT.double()
    )
    adv_B = advantages.remax(rollout.reward_B, rollout.group_B, baseline_B=baseline_B)
    torch.testing.assert_close(adv_B[:, None] * rollout.mask_BT, adv_BT * rollout.mask_BT, **TIGHT)


def test_pass_at_k_of_a_whole_group_is_verls_times_n(verl, rollout):
    adv_BT, _ = verl.compute_grpo_passk_outcome_advantage(
        at_end(rollout.reward_B, rollout.mask_BT), rollout.mask_BT.double(), rollout.group_B.numpy(),
        config=verl.AlgoConfig(norm_adv_by_std_in_grpo=False),
    )  # fmt: skip
    adv_B = advantages.pass_at_k(rollout.reward_B, rollout.group_B, k=4)
    torch.testing.assert_close(adv_B[:, None] * rollout.mask_BT / 4, adv_BT, **TIGHT)


@pytest.mark.parametrize("holes", [False, True])
def test_gae_which_verl_whitens_at_once(verl, rollout, holes):
    mask_BT = rollout.holes_BT if holes else rollout.mask_BT
    value_BT = rollout.value_BT.detach()
    adv_BT, return_BT = verl.compute_gae_advantage_return(rollout.return_BT, value_BT, mask_BT.double(), 0.97, 0.9)
    our_adv_BT, our_return_BT = advantages.gae(rollout.return_BT, value_BT, mask_BT, 0.97, 0.9)
    torch.testing.assert_close(masked_whiten(our_adv_BT, mask_BT), adv_BT * mask_BT, **TIGHT)
    torch.testing.assert_close(our_return_BT, return_BT * mask_BT, **TIGHT)


@pytest.mark.parametrize(("mode", "theirs"), [("token_mean", "token-mean"), ("seq_mean", "seq-mean-token-mean"),
                                              ("seq_sum_const", "seq-mean-token-sum-norm")])  # fmt: skip
def test_aggregation_whole_and_by_ranks(verl, rollout, mode, theirs):
    mask_BT = rollout.mask_BT.clone()
    mask_BT[3] = False  # a dummy row
    loss_BT = rollout.logp_BT.detach()
    tokens, sequences = loss_totals(mask_BT).tolist()
    ranks = [slice(0, 5), slice(5, 12)]
    expected = verl.agg_loss(loss_BT, mask_BT.double(), theirs, loss_scale_factor=50)
    total = sum(
        float((loss_BT[r] * loss_weights(mask_BT[r], mode, total_tokens=tokens, total_sequences=sequences,
                                         constant=50)).sum())
        for r in ranks
    )  # fmt: skip
    by_ranks = sum(
        verl.agg_loss(loss_BT[r], mask_BT[r].double(), theirs, dp_size=2, batch_num_tokens=tokens,
                      global_batch_size=sequences, loss_scale_factor=50) / 2
        for r in ranks
    )  # fmt: skip
    assert total == pytest.approx(float(expected), rel=1e-6) == pytest.approx(float(by_ranks), rel=1e-6)


@pytest.mark.parametrize(("name", "theirs", "ours"), [
    ("clipped", "vanilla", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}),
    ("gspo", "gspo", {"clip_low": 0.05, "clip_high": 0.1}),
    ("cispo", "cispo", {"clip_low": 0.3, "clip_high": 0.2}),
])  # fmt: skip
def test_policy_losses(verl, rollout, name, theirs, ours):
    config = verl.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=12,
        clip_ratio_low=ours["clip_low"], clip_ratio_high=ours["clip_high"], clip_ratio_c=ours.get("dual_clip", 3.0),
    )  # fmt: skip
    args = (rollout.adv_BT, rollout.mask_BT)
    expected, _ = verl.get_policy_loss_fn(theirs)(
        rollout.old_BT, rollout.logp_BT, args[0], args[1].double(), "seq-mean-token-mean", config
    )
    loss = {"clipped": policy_losses.clipped_loss, "gspo": policy_losses.gspo_loss, "cispo": policy_losses.cispo_loss}
    loss_BT = loss[name](rollout.logp_BT, rollout.old_BT, *args, **ours)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "seq_mean"), expected, rollout.logp_BT)


def test_value_loss(verl, rollout):
    expected, _ = verl.compute_value_loss(
        rollout.value_BT, rollout.return_BT, rollout.old_value_BT, rollout.mask_BT.double(), 0.2
    )
    loss_BT = clipped_value_loss(rollout.value_BT, rollout.old_value_BT, rollout.return_BT, clip=0.2)
    same_loss(mean_loss(loss_BT, rollout.mask_BT, "token_mean"), expected, rollout.value_BT)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_estimators_and_their_gradients(verl, rollout, name, unbiased):
    expected_BT = verl.kl_penalty(rollout.logp_BT, rollout.ref_BT, name + "+" * unbiased)
    ours_BT = kl.kl_loss(rollout.logp_BT, rollout.ref_BT, name, unbiased_gradient=unbiased)
    torch.testing.assert_close(ours_BT, expected_BT, **TIGHT)
    same_loss(ours_BT.sum(), expected_BT.sum(), rollout.logp_BT)


def test_adaptive_kl_controller(verl):
    theirs, ours = verl.AdaptiveKLController(0.1, 6.0, 1000), kl.AdaptiveKL(0.1, 6.0, 1000)
    for measured in (3.0, 5.9, 6.5, 40.0, 0.0):
        theirs.update(measured, 128)
        ours = ours.update(measured, 128)
        assert ours.coef == pytest.approx(theirs.value, rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "threshold"), [("truncate", 1.3), ("mask", "0.7_1.3")])
def test_correction_weights(corrections_of_verl, rollout, level, mode, threshold):
    logp_BT = rollout.logp_BT.detach()
    expected_BT, _ = corrections_of_verl.compute_rollout_correction_weights(
        logp_BT - rollout.old_BT, rollout.mask_BT.double(), rollout_is=level, rollout_is_threshold=threshold
    )
    ours_BT = importance_weights(logp_BT, rollout.old_BT, rollout.mask_BT, level=level, mode=mode, low=0.7, high=1.3)
    torch.testing.assert_close(ours_BT, expected_BT, **TIGHT)


def test_log_probs_entropy_and_whitening(verl, rollout):
    from verl.utils import torch_functional as theirs

    logits_BTV = torch.randn(3, 5, 7, dtype=torch.float64)
    tokens_BT = torch.randint(0, 7, (3, 5))
    expected_BT = theirs.logprobs_from_logits_naive(logits_BTV[:, :-1], tokens_BT[:, 1:])
    torch.testing.assert_close(token_logprobs(logits_BTV, tokens_BT)[:, 1:], expected_BT, **TIGHT)
    torch.testing.assert_close(
        token_entropy(logits_BTV)[:, 1:], theirs.entropy_from_logits(logits_BTV)[:, :-1], **TIGHT
    )
    expected_BT = theirs.masked_whiten(rollout.value_BT, rollout.mask_BT) * rollout.mask_BT
    torch.testing.assert_close(masked_whiten(rollout.value_BT, rollout.mask_BT), expected_BT, **TIGHT)


# ---- where we differ on purpose ---------------------------------------------------------------------------


def test_verls_k3_loses_its_gradient_where_the_policy_drifted_farthest(verl):
    logp = torch.tensor([-8.0], requires_grad=True)
    (theirs,) = torch.autograd.grad(verl.kl_penalty(logp, torch.tensor([-3.0]), "k3").sum(), logp)
    (ours,) = torch.autograd.grad(kl.kl_estimate(logp, torch.tensor([-3.0]), "k3").sum(), logp)
    assert theirs.item() == 0.0
    assert ours.item() == pytest.approx(1 - np.exp(5.0))


def test_verl_gives_the_only_answer_of_a_group_its_raw_reward(verl):
    mask_BT = torch.ones(1, 1, dtype=torch.float64)
    adv_BT, _ = verl.compute_grpo_outcome_advantage(torch.full((1, 1), 5.0).double(), mask_BT, np.array([0]))
    assert adv_BT.item() == pytest.approx(5.0, rel=1e-5)
    assert advantages.grpo(torch.tensor([5.0]), torch.tensor([0])).item() == 0.0


def test_verls_coefficient_turns_negative_when_the_batch_exceeds_the_horizon(verl):
    theirs = verl.AdaptiveKLController(0.1, 6.0, 1000)
    theirs.update(0.0, 10_000)
    assert theirs.value < 0 < kl.AdaptiveKL(0.1, 6.0, 1000).update(0.0, 10_000).coef


def test_verls_default_dr_grpo_normaliser_changes_with_the_padding(verl):
    loss_BT, mask_BT = torch.ones(2, 3).double(), torch.ones(2, 3).double()
    wide = (torch.nn.functional.pad(x, (0, 3)) for x in (loss_BT, mask_BT))
    narrow = verl.agg_loss(loss_BT, mask_BT, "seq-mean-token-sum-norm")
    assert narrow.item() == 2 * verl.agg_loss(*wide, "seq-mean-token-sum-norm").item()
