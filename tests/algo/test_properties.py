"""What must hold for any input: hypothesis looks for a counter-example; gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algo import advantages, kl, policy_losses, preference
from rlhf_ray.algo.advantages import informative_groups
from rlhf_ray.algo.aggregation import AGGREGATIONS, loss_totals, loss_weights, masked_whiten
from rlhf_ray.algo.corrections import importance_weights, mismatch_stats, mismatch_summary
from rlhf_ray.algo.policy_losses import combine_stats, past_clip, ratio_stats
from rlhf_ray.algo.value_losses import clipped_value_loss, explained_variance, value_stats
from rlhf_ray.config.formula_names import ADVANTAGES, POLICY_LOSSES

quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "pass_at_k")


@st.composite
def batches(draw):
    """(logp, old, adv, mask), float64, 1 to 6 rows of 1 to 7 tokens; masks with holes and empty rows."""
    B, T = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(seeds))
    logp_BT, old_BT, adv_BT = torch.randn(3, B, T, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return logp_BT, old_BT, adv_BT, mask_BT


def step_loss(loss, parts, mode):
    """The loss of an optimiser step whose rows are spread over several micro-batches."""
    tokens, sequences = sum(loss_totals(mask_BT) for *_, mask_BT in parts).tolist()
    total = torch.zeros((), dtype=torch.float64)
    for logp_BT, old_BT, adv_BT, mask_BT in parts:
        weight_BT = loss_weights(mask_BT, mode, total_tokens=tokens, total_sequences=sequences, constant=9)
        total = total + (loss(logp_BT, old_BT, adv_BT, mask_BT) * weight_BT).sum()
    return total


@quick
@given(batches(), st.sampled_from(sorted(POLICY_LOSSES)), st.sampled_from(AGGREGATIONS), seeds)
def test_split_order_and_padding_do_not_change_loss_or_gradient(batch, name, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    logp_BT = batch[0].requires_grad_()
    B = len(logp_BT)
    whole = step_loss(POLICY_LOSSES[name], [batch], mode)
    (grad_BT,) = torch.autograd.grad(whole, logp_BT)

    order = torch.randperm(B, generator=generator)
    cut = int(torch.randint(0, B + 1, (1,), generator=generator))
    # a rank without rows contributes a dummy row that is all masked
    parts = []
    for rows in (order[:cut], order[cut:]):
        if len(rows):
            parts.append([x[rows] for x in batch])
        else:
            parts.append([torch.full((1, 3), float("nan"))] * 3 + [torch.zeros(1, 3, dtype=torch.bool)])
    padded = [torch.nn.functional.pad(x, (1, 2), value=-1e30) for x in parts[0][:3]]
    parts[0] = [*padded, torch.nn.functional.pad(parts[0][3], (1, 2))]
    split = step_loss(POLICY_LOSSES[name], parts, mode)
    (split_grad_BT,) = torch.autograd.grad(split, logp_BT, allow_unused=True)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(split_grad_BT, grad_BT, rtol=1e-6, atol=1e-9)
    assert (grad_BT[~batch[3]] == 0).all()


@quick
@given(batches(), seeds)
def test_statistics_of_parts_are_those_of_the_whole(batch, seed):
    logp_BT, old_BT, adv_BT, mask_BT = batch
    cut = seed % len(logp_BT)
    rows = [slice(0, cut), slice(cut, None)] if cut else [slice(None)]
    for function in (
        lambda r: ratio_stats(logp_BT[r], old_BT[r], mask_BT[r], adv_BT[r], past_clip),
        lambda r: mismatch_stats(logp_BT[r], old_BT[r], mask_BT[r]),
        lambda r: value_stats(logp_BT[r], old_BT[r], mask_BT[r]),
    ):
        whole, parts = function(slice(None)), combine_stats(function(r) for r in rows)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-9)


@quick
@given(st.integers(1, 5), st.integers(1, 6), seeds, st.floats(-100, 100), st.sampled_from(GROUP_ESTIMATORS))
def test_group_advantages_know_neither_row_order_nor_labels_nor_a_constant(groups, size, seed, shift, name):
    generator = torch.Generator().manual_seed(seed)
    reward_B = torch.randint(0, 4, (groups * size,), generator=generator).double()
    group_B = torch.arange(groups).repeat_interleave(size)
    adv_B = ADVANTAGES[name](reward_B, group_B)
    order = torch.randperm(len(reward_B), generator=generator)
    label = torch.randperm(groups, generator=generator) * 1000 - 7
    permuted_B = ADVANTAGES[name](reward_B[order] + shift, label[group_B][order])
    torch.testing.assert_close(permuted_B, adv_B[order], rtol=1e-6, atol=1e-6)
    if name != "pass_at_k":  # the others' baseline is the group's mean
        for g in range(groups):
            assert abs(float(adv_B[group_B == g].sum())) < 1e-6


@quick
@given(st.integers(1, 6), seeds, st.floats(-1e6, 1e6), st.sampled_from(["grpo", "dr_grpo", "rloo", "pass_at_k"]))
def test_only_groups_that_differ_teach(size, seed, reward, name):
    generator = torch.Generator().manual_seed(seed)
    group_B = torch.arange(2).repeat_interleave(size)
    reward_B = torch.full((2 * size,), reward)
    reward_B[:size] = torch.randint(0, 2, (size,), generator=generator).float()
    keep_B = informative_groups(reward_B, group_B)
    adv_B = ADVANTAGES[name](reward_B, group_B)
    assert (adv_B[~keep_B] == 0).all() and not keep_B[size:].any()
    if name == "pass_at_k":  # two right answers of three: the best of three is right without either of them
        assert keep_B.any() or (adv_B == 0).all()
    else:
        assert bool(keep_B.any()) == bool((adv_B != 0).any())


@quick
@given(batches(), st.sampled_from([-1e4, -50.0, 50.0, 1e4]), st.sampled_from(sorted(POLICY_LOSSES)))
def test_any_log_ratio_is_survived(batch, gap, name):
    logp_BT, _, adv_BT, mask_BT = (x.float() if x.is_floating_point() else x for x in batch)
    logp_BT.requires_grad_()
    old_BT = logp_BT.detach() - gap
    loss_BT = POLICY_LOSSES[name](logp_BT, old_BT, adv_BT, mask_BT)
    kl_BT = kl.kl_loss(logp_BT, old_BT, "k3") + kl.kl_loss(logp_BT, old_BT, "k3", unbiased_gradient=False)
    (grad_BT,) = torch.autograd.grad((loss_BT + kl_BT).sum(), logp_BT)
    assert torch.isfinite(loss_BT).all() and torch.isfinite(kl_BT).all() and torch.isfinite(grad_BT).all()
    for level in ("token", "sequence", "geometric"):
        for mode in ("none", "truncate", "mask"):
            weight_BT = importance_weights(logp_BT.detach(), old_BT, mask_BT, level=level, mode=mode)
            assert torch.isfinite(weight_BT).all() and (weight_BT >= 0).all()
    summary = mismatch_summary(mismatch_stats(logp_BT.detach(), old_BT, mask_BT))
    assert all(x == x and abs(x) != float("inf") for x in summary.values()) and 0 < summary["ess"] <= 1 + 1e-5


@quick
@given(batches(), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_is_that_of_the_tokens_in_the_mask_alone(batch, gamma, lam):
    reward_BT, value_BT, _, mask_BT = batch
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, mask_BT, gamma, lam)
    for b in range(len(mask_BT)):
        on = mask_BT[b]
        short = advantages.gae(
            reward_BT[b, on][None], value_BT[b, on][None], torch.ones(1, int(on.sum()), dtype=torch.bool), gamma, lam
        ) if on.any() else (torch.zeros(1, 0).double(),) * 2  # fmt: skip
        torch.testing.assert_close(adv_BT[b, on][None], short[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(return_BT[b, on][None], short[1], rtol=1e-9, atol=1e-9)
    assert (adv_BT[~mask_BT] == 0).all() and (return_BT[~mask_BT] == 0).all()


@quick
@given(batches())
def test_explained_variance_never_exceeds_one(batch):
    value_BT, return_BT, _, mask_BT = batch
    assert explained_variance(value_stats(value_BT, return_BT, mask_BT)) <= 1.0 + 1e-9


# ---- gradients against finite differences, float64 ---------------------------------------------------------

torch.manual_seed(5)
LOGP_BT = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
OLD_BT, ADV_BT, REF_BT = 0.5 * torch.randn(3, 3, 4, dtype=torch.float64) + torch.stack(
    [LOGP_BT.detach(), torch.zeros(3, 4), LOGP_BT.detach()]
)
MASK_BT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
FUNCTIONS = {
    "clipped": lambda x: policy_losses.clipped_loss(x, OLD_BT, ADV_BT, MASK_BT, dual_clip=1.5),
    "policy_gradient": lambda x: policy_losses.policy_gradient_loss(x, OLD_BT, ADV_BT, MASK_BT),
    "k1": lambda x: kl.kl_estimate(x, REF_BT, "k1"),
    "k2": lambda x: kl.kl_estimate(x, REF_BT, "k2"),
    "k3": lambda x: kl.kl_estimate(x, REF_BT, "k3"),
    "k3 beyond its bound": lambda x: kl.kl_estimate(x, REF_BT + 20.0, "k3"),
    "value": lambda x: clipped_value_loss(x, OLD_BT, ADV_BT, clip=0.2),
    "bradley_terry": lambda x: preference.bradley_terry_loss(x[:, 0], x[:, 1], 0.3),
    "ranked": lambda x: preference.ranked_loss(x, torch.tensor([[0, 1, 2, 3], [1, 0, 0, 2], [0, 1, -1, 2]])),
    "dpo": lambda x: preference.dpo_loss(*x.T[:, :3], 0.3, label_smoothing=0.1, nll_weight=0.5)[0],
    "ipo": lambda x: preference.dpo_loss(*x.T[:, :3], 0.3, kind="ipo")[0],
    "whiten": lambda x: masked_whiten(x, MASK_BT),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_finite_differences(name):
    assert torch.autograd.gradcheck(FUNCTIONS[name], (LOGP_BT,))


def test_finite_differences_of_gspo_on_whole_sequences():
    """The per-token form stops gradients, so the check is on the sum it was made for: seq_mean with one advantage."""
    adv_BT = torch.tensor([[1.0], [-2.0], [0.5]]).double().expand(3, 4)

    def by_tokens(x):
        loss_BT = policy_losses.gspo_loss(x, OLD_BT, adv_BT, MASK_BT, clip_low=0.9, clip_high=9.0)
        return (loss_BT * loss_weights(MASK_BT, "seq_mean", total_tokens=8, total_sequences=3)).sum()

    def by_sequences(x):
        d_B = ((x - OLD_BT) * MASK_BT).sum(1) / MASK_BT.sum(1)
        return -(d_B.exp() * adv_BT[:, 0]).mean()

    assert torch.autograd.gradcheck(by_sequences, (LOGP_BT,))
    torch.testing.assert_close(by_tokens(LOGP_BT), by_sequences(LOGP_BT), rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(f(LOGP_BT), LOGP_BT)[0] for f in (by_tokens, by_sequences)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_finite_differences_of_cispo_with_its_weight_held_fixed():
    weight_BT = (LOGP_BT - OLD_BT).exp().detach().clamp(0.0, 5.0)
    held = lambda x: -(weight_BT * ADV_BT * x * MASK_BT).sum()  # noqa: E731
    assert torch.autograd.gradcheck(held, (LOGP_BT,))
    grads = [
        torch.autograd.grad(f, LOGP_BT)[0]
        for f in (policy_losses.cispo_loss(LOGP_BT, OLD_BT, ADV_BT, MASK_BT).sum(), held(LOGP_BT))
    ]
    torch.testing.assert_close(*grads)
