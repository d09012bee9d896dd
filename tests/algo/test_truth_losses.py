"""Expected gradients of policy losses, aggregation and importance corrections against exact ones.

The problem, on which everything can be listed, is in `enumerable.py`. A Monte Carlo test at the end takes the sampled
road through the same functions, with confidence bounds.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from enumerable import (
    GRADED_OBJECTIVE,
    GRADED_S,
    MASK_ST,
    OBJECTIVE,
    PROBABILITY_S,
    REWARD_S,
    SCORE_SNV,
    SCORE_STNV,
    STALE,
    STATES,
    TABLE,
    K,
    S,
    T,
    V,
    batch_expectation,
    bias,
    chance,
    constant_ST,
    expectation,
    gradient,
    huge_batch,
    logprobs_of,
    same,
    under,
)
from torch import Tensor

from rlhf_ray.algo import advantages
from rlhf_ray.algo.aggregation import loss_totals, loss_weights
from rlhf_ray.algo.corrections import importance_weights
from rlhf_ray.algo.policy_losses import cispo_loss, clipped_loss, gspo_loss, policy_gradient_loss
from rlhf_ray.config.formula_names import POLICY_LOSSES

dual_clipped_loss = partial(clipped_loss, dual_clip=1.5)

# ---- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*POLICY_LOSSES.values(), dual_clipped_loss])
def test_losses_on_fresh_data_have_the_objectives_gradient(loss):
    old_ST = logprobs_of(TABLE)
    same(gradient(lambda x: -under(TABLE, loss(logprobs_of(x), old_ST, constant_ST(REWARD_S), MASK_ST))), OBJECTIVE)


def clipped_weight(ratio_ST: Tensor, low: float, high: float) -> Tensor:
    """What the clipped loss multiplies A grad log p with: the ratio, or 0 where its gradient is clipped away."""
    gone_ST = torch.where(REWARD_S[:, None] > 0, ratio_ST > 1 + high, ratio_ST < 1 - low)
    return ratio_ST.masked_fill(gone_ST, 0.0)


def dual_clipped_weight(ratio_ST: Tensor) -> Tensor:
    return clipped_weight(ratio_ST, 0.2, 0.2).masked_fill((REWARD_S[:, None] < 0) & (ratio_ST > 1.5), 0.0)


# What each loss weighs A grad log p with at ratio rho, and the aggregation it is made for.
SURROGATES = {
    "policy_gradient": (policy_gradient_loss, torch.ones_like, "seq_sum_const"),
    "clipped": (clipped_loss, lambda rho: clipped_weight(rho, 0.2, 0.2), "seq_sum_const"),
    "clip higher": (
        partial(clipped_loss, clip_high=0.28), lambda rho: clipped_weight(rho, 0.2, 0.28), "seq_sum_const",
    ),
    "dual clip": (dual_clipped_loss, dual_clipped_weight, "seq_sum_const"),
    "cispo": (partial(cispo_loss, clip_low=0.1, clip_high=0.3), lambda rho: rho.clamp(0.9, 1.3), "seq_sum_const"),
    "gspo": (
        partial(gspo_loss, clip_low=0.1, clip_high=0.15), lambda rho: clipped_weight(rho, 0.1, 0.15), "seq_mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROGATES)
def test_losses_on_stale_data_have_the_gradient_of_their_surrogate(name):
    """Against the sum by hand: no autograd, no function of the package."""
    loss, weight_of, mode = SURROGATES[name]
    old_ST, log_ratio_ST = logprobs_of(STALE), logprobs_of(TABLE) - logprobs_of(STALE)
    length_S1 = MASK_ST.sum(1, keepdim=True)
    if name == "gspo":
        log_ratio_ST = (log_ratio_ST.sum(1, keepdim=True) / length_S1).expand(S, T)
    weight_ST = weight_of(log_ratio_ST.exp()) * MASK_ST
    if name not in ("policy_gradient", "cispo"):
        assert (weight_ST[MASK_ST] == 0).any() and (weight_ST[MASK_ST] != 0).any(), "some are clipped, some not"
    if mode == "seq_mean":
        weight_ST = weight_ST / length_S1
    by_hand = torch.einsum("s,st,stnv->nv", chance(STALE) * REWARD_S, weight_ST, SCORE_STNV)
    actual = gradient(lambda x: -under(STALE, loss(logprobs_of(x), old_ST, constant_ST(REWARD_S), MASK_ST), mode))
    same(actual, by_hand)


def test_gspo_unclipped_is_the_gradient_of_the_sequence_ratio():
    def objective(table_NV: Tensor) -> Tensor:
        mean_S = (logprobs_of(table_NV) - logprobs_of(STALE)).sum(1) / MASK_ST.sum(1)
        return (chance(STALE) * mean_S.exp() * REWARD_S).sum()

    wide = partial(gspo_loss, clip_low=0.99, clip_high=99.0)
    loss = lambda x: wide(logprobs_of(x), logprobs_of(STALE), constant_ST(REWARD_S), MASK_ST)  # noqa: E731
    same(gradient(lambda x: -under(STALE, loss(x), "seq_mean")), gradient(objective))


# ---- aggregation ------------------------------------------------------------------------------------------


def test_sequence_means_weigh_by_length():
    old_ST = logprobs_of(TABLE)

    def mean(mode):
        return gradient(
            lambda x: -under(TABLE, clipped_loss(logprobs_of(x), old_ST, constant_ST(REWARD_S), MASK_ST), mode)
        )

    assert bias(mean("seq_sum_const"), OBJECTIVE) < 1e-6
    length_S = MASK_ST.sum(1)
    same(mean("seq_mean"), torch.einsum("s,snv->nv", PROBABILITY_S * REWARD_S / length_S, SCORE_SNV))
    assert bias(mean("seq_mean"), OBJECTIVE) > 0.05


def aggregated(mode: str):
    """Reward times the weight in the step's mean: f(rows, groups) as `batch_expectation` wants it."""

    def estimator(rows_B: Tensor, group_B: Tensor) -> Tensor:
        tokens, sequences = loss_totals(MASK_ST[rows_B]).tolist()
        weight_BT = loss_weights(MASK_ST[rows_B], mode, total_tokens=tokens, total_sequences=sequences, constant=T)
        return GRADED_S[rows_B, None] * weight_BT.double() * len(rows_B)

    return estimator


def test_token_means_weigh_by_length_only_in_small_batches():
    """In one step all answers are divided by the same number; only between steps does it differ, less and less."""
    biases = [bias(batch_expectation(aggregated("token_mean"), B), GRADED_OBJECTIVE) for B in (1, 2, 4, 8)]
    assert biases == pytest.approx([0.49, 0.23, 0.10, 0.05], abs=0.006)
    assert bias(huge_batch(aggregated("token_mean"), 1), GRADED_OBJECTIVE) < 2e-3
    for mode, error in (("seq_mean", biases[0]), ("seq_sum_const", 0.0)):
        one, four = (bias(batch_expectation(aggregated(mode), B), GRADED_OBJECTIVE) for B in (1, 4))
        assert one == pytest.approx(error, abs=1e-6) == pytest.approx(four, abs=1e-6), "no batch changes it"


# ---- stale data -------------------------------------------------------------------------------------------


PRESETS = {
    "no correction": None,
    "token": {"level": "token", "mode": "none"},
    "token, capped at 2": {"level": "token", "mode": "truncate", "high": 2.0},
    "token, masked outside 1/2..2": {"level": "token", "mode": "mask", "low": 0.5, "high": 2.0},
    "sequence": {"level": "sequence", "mode": "none"},
    "sequence, capped at 2": {"level": "sequence", "mode": "truncate", "high": 2.0},
    "sequence, masked outside 1/2..2": {"level": "sequence", "mode": "mask", "low": 0.5, "high": 2.0},
    "geometric": {"level": "geometric", "mode": "none"},
    "geometric, masked outside 1/2..2": {"level": "geometric", "mode": "mask", "low": 0.5, "high": 2.0},
}


def stale_error(problem: int, preset: dict | None = None, loss=policy_gradient_loss) -> float:
    """Relative error of the exact expected gradient on answers of an older policy, in a random problem."""
    generator = torch.Generator().manual_seed(problem)
    now_NV = torch.randn(STATES, V, generator=generator).double()
    old_NV = now_NV + 0.4 * torch.randn(STATES, V, generator=generator).double()
    reward_S = torch.randn(S, generator=generator).double()
    exact = gradient(lambda x: (chance(x) * reward_S).sum(), now_NV)
    adv_ST = constant_ST(reward_S - float((chance(old_NV) * reward_S).sum()))
    weight_ST = MASK_ST.double()
    if preset:
        weight_ST = importance_weights(logprobs_of(now_NV), logprobs_of(old_NV), MASK_ST, **preset)

    def objective(x: Tensor) -> Tensor:
        return -under(old_NV, loss(logprobs_of(x), logprobs_of(old_NV), adv_ST, MASK_ST) * weight_ST)

    return float((gradient(objective, now_NV) - exact).norm() / exact.norm())


@pytest.mark.slow
def test_corrections_remove_the_bias_of_stale_data():
    """Mean over 20 random problems; docs/algorithms.md has these numbers."""
    error = {name: sum(stale_error(p, preset) for p in range(20)) / 20 for name, preset in PRESETS.items()}
    documented = [0.34, 0.21, 0.21, 0.23, 0.0, 0.03, 0.18, 0.19, 0.19]
    assert list(error.values()) == pytest.approx(documented, abs=0.006)
    assert error["no correction"] > 0.3, "the bias must be visible"
    assert error["sequence"] < 1e-6, "gone"
    assert error["sequence, capped at 2"] < 0.05, "a cap pays for bounded weights with a little bias"
    for name in set(PRESETS) - {"no correction", "sequence", "sequence, capped at 2"}:
        assert 0.1 < error[name] < 0.75 * error["no correction"], f"{name}: smaller, not gone"


# The wide ranges clip nothing here, so what is left is the error of the weight itself.
RATIO_LOSSES = {
    "policy_gradient": policy_gradient_loss,
    "clipped, wide": partial(clipped_loss, clip_low=0.99, clip_high=99.0),
    "clipped": clipped_loss,
    "clip higher": partial(clipped_loss, clip_high=0.28),
    "dual clip": dual_clipped_loss,
    "cispo": cispo_loss,
    "gspo, wide": partial(gspo_loss, clip_low=0.99, clip_high=99.0),
    "gspo": gspo_loss,
}


@pytest.mark.slow
def test_what_the_losses_make_of_stale_data():
    """A ratio at each token removes some of the error, as the correction `token` does; a clip adds more than that."""
    error = {name: sum(stale_error(p, loss=loss) for p in range(20)) / 20 for name, loss in RATIO_LOSSES.items()}
    token, geometric = (sum(stale_error(p, PRESETS[name]) for p in range(20)) / 20 for name in ("token", "geometric"))
    assert error["clipped, wide"] == pytest.approx(token) == pytest.approx(error["cispo"])
    assert error["gspo, wide"] == pytest.approx(geometric)
    documented = [0.34, 0.21, 0.56, 0.51, 0.57, 0.21, 0.19, 0.67]
    assert list(error.values()) == pytest.approx(documented, abs=0.006)


# ---- the sampled road -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "pass_at_k"])
@pytest.mark.parametrize("stale", [False, True])
def test_sampled_gradients_lie_within_their_confidence_bounds(name, stale):
    """Draw answers, score, compare, lose, sum over micro-batches: the mean gradient is within 4.5 standard errors."""
    torch.manual_seed(23)
    groups, parts = 30_000, 30
    behaviour = STALE if stale else TABLE
    rows = torch.multinomial(chance(behaviour), groups * K, replacement=True)
    group_B = torch.arange(groups).repeat_interleave(K)
    estimator = {"rloo": advantages.rloo, "dr_grpo": advantages.dr_grpo,
                 "pass_at_k": lambda r, g: advantages.pass_at_k(r, g, k=2)}[name]  # fmt: skip
    adv_B, mask_BT = estimator(REWARD_S[rows], group_B), MASK_ST[rows]
    generated_BT = logprobs_of(behaviour)[rows]
    _, sequences = loss_totals(mask_BT).tolist()
    estimates = []
    for part in torch.arange(groups * K).chunk(parts):
        leaf = TABLE.clone().requires_grad_()
        logp_BT = logprobs_of(leaf)[rows[part]]
        loss_BT = clipped_loss(logp_BT, logp_BT.detach(), adv_B[part, None].expand(-1, T), mask_BT[part])
        weight_BT = loss_weights(
            mask_BT[part], "seq_sum_const", total_tokens=1, total_sequences=sequences / parts, constant=1
        )
        if stale:  # the whole group is drawn from the older policy: one weight for all of it
            seq_BT = importance_weights(logp_BT, generated_BT[part], mask_BT[part], level="sequence", mode="none")
            weight_BT = weight_BT * seq_BT[:, :1].view(-1, K).prod(1).repeat_interleave(K)[:, None]
        (-(loss_BT * weight_BT).sum()).backward()
        estimates.append(leaf.grad)
    mean, standard_error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / parts**0.5
    z = ((mean - expectation(estimator)) / standard_error).abs().max()
    assert z < 4.5, "21 comparisons with 29 degrees of freedom: 4.5 is passed in under one test of 200"
