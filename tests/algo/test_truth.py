"""Expected gradients of advantages, the KL terms, entropy and the critic's loss against exact ones.

The problem, on which everything can be listed, is in `enumerable.py`. Policy losses, aggregation and stale data are in
`test_truth_losses.py`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from enumerable import (
    GRADED_OBJECTIVE,
    GRADED_S,
    GROUP_CHANCE_G,
    GROUPS_GK,
    MASK_ST,
    OBJECTIVE,
    PROBABILITY_S,
    REFERENCE,
    REWARD_S,
    SCORE_SNV,
    STALE,
    STATE_ST,
    STATES,
    TABLE,
    VALUE_N,
    K,
    S,
    T,
    V,
    batch_expectation,
    bias,
    chance,
    expectation,
    gradient,
    huge_batch,
    logits_of,
    logprobs_of,
    objective_gradient,
    same,
    under,
    visits,
)
from torch import Tensor

from rlhf_ray.algo import advantages
from rlhf_ray.algo.advantages import informative_groups
from rlhf_ray.algo.aggregation import masked_whiten
from rlhf_ray.algo.kl import kl_estimate, kl_loss
from rlhf_ray.algo.logprobs import token_entropy
from rlhf_ray.algo.policy_losses import policy_gradient_loss
from rlhf_ray.algo.shaping import RunningMoments, normalize_per_group, token_rewards
from rlhf_ray.algo.value_losses import clipped_value_loss


def test_the_list_is_complete():
    assert (S, STATES) == (15, 7)
    assert PROBABILITY_S.sum().item() == pytest.approx(1.0) and GROUP_CHANCE_G.sum().item() == pytest.approx(1.0)
    same((PROBABILITY_S[:, None, None] * SCORE_SNV).sum(0), torch.zeros(STATES, V).double())
    same(SCORE_SNV[5], gradient(lambda x: logprobs_of(x)[5].sum()))
    assert sorted(GRADED_S.unique().tolist()) == [-1.0, 0.0, 1.0]
    plain = lambda rows_B, _: GRADED_S[rows_B, None] * MASK_ST[rows_B]  # noqa: E731
    same(batch_expectation(plain, groups=2, size=2), GRADED_OBJECTIVE)
    assert bias(huge_batch(plain), GRADED_OBJECTIVE) < 2e-3


# ---- advantages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "scale"), [
    (advantages.rloo, 1.0),
    (lambda r, g: advantages.reinforce(r, g, baseline=advantages.MovingBaseline().update(REWARD_S[:4]).value), 1.0),
    (lambda r, g: advantages.remax(r, g, baseline_B=torch.full_like(r, float(REWARD_S[4]))), 1.0),
    (advantages.dr_grpo, 1 - 1 / K),  # the mean contains the answer itself
])  # fmt: skip
def test_unbiased_baselines(estimator, scale):
    same(expectation(estimator), scale * OBJECTIVE)


def test_batch_mean_baseline_shrinks_by_one_over_the_batch():
    whole_batch = lambda r, g: torch.cat([  # noqa: E731
        advantages.reinforce(part, torch.zeros(K, dtype=torch.int64)) for part in r.view(-1, K)
    ])  # fmt: skip
    same(expectation(whole_batch), (1 - 1 / K) * OBJECTIVE)


def test_division_by_the_groups_std_is_biased():
    grpo = expectation(lambda r, g: advantages.grpo(r, g, eps=0.0).nan_to_num(0.0))
    assert 0.05 < bias(grpo, OBJECTIVE) < 1.0
    # with right/wrong rewards and one prompt only the step size is wrong, not the direction ...
    right_S = (REWARD_S > 0).double()
    exact = gradient(lambda x: (chance(x) * right_S).sum())
    assert bias(expectation(lambda r, g: advantages.grpo(r, g), right_S), exact) < 1e-6


def test_division_by_the_groups_std_favours_easy_and_hopeless_prompts():
    """Gain over the true gradient for a prompt answered right with chance p, eight answers, one logit."""

    def gain(p: float) -> float:
        reward_GK = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8))).double()
        chance_G = (reward_GK * p + (1 - reward_GK) * (1 - p)).prod(1)
        group_B = torch.arange(len(reward_GK)).repeat_interleave(8)
        adv_GK = advantages.grpo(reward_GK.flatten(), group_B).view(-1, 8)
        return float((chance_G * (adv_GK * (reward_GK - p)).mean(1)).sum()) / (p * (1 - p))

    assert gain(0.5) == pytest.approx(1.74, abs=0.02)
    assert gain(0.95) == pytest.approx(gain(0.05), rel=1e-6)
    assert gain(0.95) > 1.2 * gain(0.5)


@pytest.mark.parametrize(("estimator", "ratio"), [
    (advantages.rloo, 1.0), (advantages.reinforce_pp_baseline, 0.86), (advantages.grpo, 1.33),
])  # fmt: skip
def test_how_unequally_two_prompts_count(estimator, ratio):
    """Two prompts in one batch, right with chance 0.95 and 0.5, eight answers each: one gain divided by the other.

    Only GRPO's stays so in a larger batch, where the std of whitening is one number for all prompts.
    """
    chances, n = (0.95, 0.5), 8
    gain = [0.0, 0.0]
    for right in itertools.product(range(n + 1), repeat=2):
        reward_B = torch.cat([(torch.arange(n) < count).double() for count in right])
        adv_GK = estimator(reward_B, torch.arange(2).repeat_interleave(n)).view(2, n)
        batch = math.prod(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c, p in zip(right, chances, strict=True))
        for g, p in enumerate(chances):
            gain[g] += batch * float((adv_GK[g] * (reward_B.view(2, n)[g] - p)).mean()) / (p * (1 - p))
    assert gain[0] / gain[1] == pytest.approx(ratio, abs=0.01)


def every_token(adv_B: Tensor) -> Tensor:
    """adv_BT; outside an answer the score is 0."""
    return adv_B[:, None].expand(-1, T)


def whitened_returns(rows_B: Tensor, group_B: Tensor) -> Tensor:
    mask_BT = MASK_ST[rows_B]
    reward_BT = token_rewards(GRADED_S[rows_B], torch.zeros(len(rows_B), T).double(), mask_BT, 0.0)
    return advantages.reinforce_pp(reward_BT, mask_BT)[0]


def whitened_gae(rows_B: Tensor, group_B: Tensor) -> Tensor:
    """PPO's, with a critic that is wrong; lambda 1, for which that does no harm by itself."""
    mask_BT = MASK_ST[rows_B]
    reward_BT = token_rewards(GRADED_S[rows_B], torch.zeros(len(rows_B), T).double(), mask_BT, 0.0)
    value_BT = VALUE_N[:T].expand(len(rows_B), T)  # by the token's place only: `batch_expectation` wants it so
    return masked_whiten(advantages.gae(reward_BT, value_BT, mask_BT, 1.0, 1.0)[0], mask_BT)


def whitened_groups(rows_B: Tensor, group_B: Tensor) -> Tensor:
    return every_token(advantages.reinforce_pp_baseline(GRADED_S[rows_B], group_B))


def whitened_groups_by_tokens(rows_B: Tensor, group_B: Tensor) -> Tensor:
    length_B = MASK_ST[rows_B].sum(1)
    return every_token(advantages.reinforce_pp_baseline(GRADED_S[rows_B], group_B, length_B=length_B))


# Groups in a batch -> the bias that docs/algorithms.md names.
@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "size", "documented"), [
    (whitened_returns, 1, {2: 0.27, 4: 0.25, 8: 0.15}),
    (whitened_gae, 1, {2: 0.20, 4: 0.15, 8: 0.09}),
    (whitened_groups, 2, {2: 0.14, 4: 0.09, 8: 0.05}),
    (whitened_groups_by_tokens, 2, {1: 0.27, 2: 0.20, 3: 0.16}),
])  # fmt: skip
def test_whitening_over_the_batch_is_biased_only_in_small_batches(estimator, size, documented):
    """Mean and std contain the answer itself. In a huge batch they are constants: a baseline and a step size."""
    lengths = estimator is not whitened_groups
    for groups, error in documented.items():
        expected = batch_expectation(estimator, groups, size, lengths=lengths)
        assert bias(expected, GRADED_OBJECTIVE) == pytest.approx(error, abs=0.006)
    assert bias(huge_batch(estimator, size), GRADED_OBJECTIVE) < 2e-3


def test_whitening_divides_by_the_spread_of_the_batch():
    mean = float(PROBABILITY_S @ GRADED_S)
    deviation = float(PROBABILITY_S @ (GRADED_S - mean) ** 2) ** 0.5
    # a group of two: r - mean_group has half of the variance, and half of the gradient (1 - 1/K)
    expected = 0.5 / (deviation * 0.5**0.5) * GRADED_OBJECTIVE
    torch.testing.assert_close(huge_batch(whitened_groups), expected, rtol=5e-3, atol=1e-3)


def test_whitening_over_the_batch_is_less_wrong_than_division_by_each_groups_std():
    by_group = lambda rows_B, group_B: every_token(advantages.grpo(GRADED_S[rows_B], group_B))  # noqa: E731
    grpo, grpo_of_four, whitened_of_eight = (
        bias(batch_expectation(estimator, groups, 2, lengths=False), GRADED_OBJECTIVE)
        for estimator, groups in ((by_group, 1), (by_group, 4), (whitened_groups, 8))
    )
    assert grpo == pytest.approx(0.175, abs=0.001) == pytest.approx(grpo_of_four, abs=0.001), "no batch cures it"
    assert bias(huge_batch(by_group), GRADED_OBJECTIVE) == pytest.approx(grpo, abs=2e-3)
    assert whitened_of_eight < 0.5 * grpo


def test_rewards_on_one_scale():
    """In each group: GRPO's advantage. By all rewards seen so far: a step size, once these are many."""
    same(expectation(normalize_per_group), expectation(advantages.grpo))

    def rescaled(seen: RunningMoments):
        def estimator(rows_B: Tensor, group_B: Tensor) -> Tensor:
            reward_B = GRADED_S[rows_B]
            reward_B = seen.update(reward_B).normalize(reward_B, center=False)
            return every_token(advantages.rloo(reward_B, group_B))

        return batch_expectation(estimator, 2, 2, lengths=False)

    first = bias(rescaled(RunningMoments()), GRADED_OBJECTIVE)
    later = bias(rescaled(RunningMoments(1000, 0.0, 500.0)), GRADED_OBJECTIVE)
    assert later < 1e-3 and first == pytest.approx(0.19, abs=0.01), (first, later)


def test_dynamic_sampling_changes_the_step_size_only_where_the_baseline_is_the_groups():
    right_S = (REWARD_S > 0).double()
    exact = objective_gradient(right_S)
    keep_G = informative_groups(right_S[GROUPS_GK].flatten(), torch.arange(len(GROUPS_GK)).repeat_interleave(K))[::K]
    share = float(GROUP_CHANCE_G @ keep_G.double())

    def among_the_kept(estimator):
        return expectation(lambda r, g: estimator(r, g) * informative_groups(r, g), right_S) / share

    same(among_the_kept(advantages.rloo), exact / share)
    same(among_the_kept(advantages.dr_grpo), (1 - 1 / K) * exact / share)
    # a baseline from elsewhere also learns from groups with equal rewards: the config refuses this
    fixed = among_the_kept(lambda r, g: advantages.reinforce(r, g, baseline=0.2))
    assert (fixed - exact / share).norm() > 0.05 * (exact / share).norm()


@pytest.mark.parametrize("k", [2, 3])
def test_pass_at_k_has_the_gradient_of_the_best_of_k(k):
    tuples = torch.tensor(list(itertools.product(range(S), repeat=k)))
    best = REWARD_S[tuples].amax(1)
    exact = gradient(lambda x: (chance(x)[tuples].prod(1) * best).sum())
    same(expectation(lambda r, g: advantages.pass_at_k(r, g, k=k)), exact)
    assert bias(exact, OBJECTIVE) > 0.2, "another objective than the mean reward"


def true_values(reward_ST: Tensor) -> Tensor:
    weighted_ST = PROBABILITY_S[:, None] * advantages.discounted_returns(reward_ST, MASK_ST)
    return torch.zeros(STATES).double().index_put_((STATE_ST,), weighted_ST, accumulate=True) / visits()


def gae_gradient(value_N: Tensor, lam: float) -> Tensor:
    reward_ST = token_rewards(REWARD_S, torch.zeros(S, T).double(), MASK_ST, 0.0)
    adv_ST, _ = advantages.gae(reward_ST, value_N[STATE_ST], MASK_ST, 1.0, lam)
    return gradient(lambda x: -under(TABLE, policy_gradient_loss(logprobs_of(x), None, adv_ST, MASK_ST)))


def test_gae_is_unbiased_with_lambda_1_or_a_true_critic():
    reward_ST = token_rewards(REWARD_S, torch.zeros(S, T).double(), MASK_ST, 0.0)
    true_N = true_values(reward_ST)
    same(gae_gradient(VALUE_N, 1.0), OBJECTIVE)
    for lam in (0.0, 0.5, 1.0):
        same(gae_gradient(true_N, lam), OBJECTIVE)
    biases = [bias(gae_gradient(VALUE_N, lam), OBJECTIVE) for lam in (1.0, 0.9, 0.5)]
    assert biases[0] < 1e-6 and 0.02 < biases[1] < biases[2], "a wrong critic misleads the more the smaller lambda"


def test_token_rewards_to_go_are_unbiased():
    """REINFORCE++'s returns before whitening, with the KL at each token: the gradient of reward - KL."""
    kl_ST = kl_estimate(logprobs_of(TABLE), logprobs_of(REFERENCE), "k1")
    togo_ST = advantages.discounted_returns(token_rewards(REWARD_S, kl_ST, MASK_ST, 0.3), MASK_ST)
    actual = gradient(lambda x: -under(TABLE, policy_gradient_loss(logprobs_of(x), None, togo_ST, MASK_ST)))
    same(actual, gradient(regularised))


# ---- KL ---------------------------------------------------------------------------------------------------


def sequence_kl(table_NV: Tensor) -> Tensor:
    return (chance(table_NV) * (logprobs_of(table_NV) - logprobs_of(REFERENCE)).sum(1)).sum()


def regularised(table_NV: Tensor) -> Tensor:
    return (chance(table_NV) * REWARD_S).sum() - 0.3 * sequence_kl(table_NV)


def next_token_kl(table_NV: Tensor, *, reverse: bool = True, states: Tensor = TABLE) -> Tensor:
    """Sum over states, each as often as `states` visits it, of the exact KL of the next token."""
    ours, theirs = table_NV.log_softmax(-1), REFERENCE.log_softmax(-1)
    kl_NV = ours.exp() * (ours - theirs) if reverse else theirs.exp() * (theirs - ours)
    return (visits(states) * kl_NV.sum(-1)).sum()


def next_token_distance(table_NV: Tensor) -> Tensor:
    """Sum of the absolute differences of the probabilities: twice the total variation."""
    distance_NV = (table_NV.softmax(-1) - REFERENCE.softmax(-1)).abs()
    return (visits() * distance_NV.sum(-1)).sum()


def test_kl_values_k1_and_k3_are_unbiased_and_k2_is_not():
    exact = float(next_token_kl(TABLE))
    assert float(sequence_kl(TABLE)) == pytest.approx(exact)
    mean = {
        name: float(under(TABLE, kl_estimate(logprobs_of(TABLE), logprobs_of(REFERENCE), name)))
        for name in ("k1", "k2", "k3", "abs")
    }
    assert mean["k1"] == pytest.approx(exact) == pytest.approx(mean["k3"])
    assert abs(mean["k2"] / exact - 1) > 0.02 and abs(mean["abs"] / exact - 1) > 0.2


def loss_gradient(estimator: str, unbiased: bool) -> Tensor:
    reference_ST = logprobs_of(REFERENCE)
    return gradient(
        lambda x: under(TABLE, kl_loss(logprobs_of(x), reference_ST, estimator, unbiased_gradient=unbiased))
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_loss_has_the_gradient_of_the_next_tokens_kl(estimator):
    same(loss_gradient(estimator, True), gradient(next_token_kl))


def test_what_the_estimators_own_gradients_are():
    same(loss_gradient("k1", False), torch.zeros(STATES, V).double())
    same(loss_gradient("k2", False), gradient(next_token_kl))
    same(loss_gradient("k3", False), gradient(lambda x: next_token_kl(x, reverse=False)))
    same(loss_gradient("abs", False), gradient(next_token_distance))
    assert bias(loss_gradient("k3", False), gradient(next_token_kl)) > 0.1


def test_kl_loss_on_tokens_of_an_older_policy():
    old_ST, reference_ST = logprobs_of(STALE), logprobs_of(REFERENCE)
    exact = gradient(lambda x: next_token_kl(x, states=STALE))
    weighted = gradient(lambda x: under(STALE, kl_loss(logprobs_of(x), reference_ST, "k3", old_BT=old_ST)))
    plain = gradient(lambda x: under(STALE, kl_loss(logprobs_of(x), reference_ST, "k3")))
    same(weighted, exact)
    assert bias(plain, exact) > 0.05


def test_kl_in_the_loss_ignores_where_a_token_leads():
    """Only the KL in the reward has the gradient of the whole answer's KL: a token also decides later states."""
    assert bias(loss_gradient("k3", True), gradient(sequence_kl)) > 0.1
    kl_S = kl_estimate(logprobs_of(TABLE), logprobs_of(REFERENCE), "k1").sum(1)
    same(expectation(advantages.rloo, REWARD_S - 0.3 * kl_S), gradient(regularised))


def test_only_k1_in_the_reward_has_the_gradient_of_the_answers_kl():
    """A reward is a constant: what a k2 or k3 would change with the policy is left out."""
    exact = gradient(sequence_kl)

    def in_the_reward(name: str) -> Tensor:
        kl_S = kl_estimate(logprobs_of(TABLE), logprobs_of(REFERENCE), name).sum(1)
        return expectation(advantages.rloo, kl_S)

    same(in_the_reward("k1"), exact)
    for name, error in {"k2": 0.81, "k3": 1.56, "abs": 0.66}.items():
        assert bias(in_the_reward(name), exact) == pytest.approx(error, abs=0.006)


# ---- entropy and the critic -------------------------------------------------------------------------------


def test_entropy_bonus_has_the_gradient_of_the_next_tokens_entropy():
    """Like the KL in the loss, it does not see where a token leads."""

    def next_token_entropy(table_NV: Tensor) -> Tensor:
        logp_NV = table_NV.log_softmax(-1)
        return -(visits() * (logp_NV.exp() * logp_NV).sum(-1)).sum()

    def answers_entropy(table_NV: Tensor) -> Tensor:
        return -(chance(table_NV) * logprobs_of(table_NV).sum(1)).sum()

    actual = gradient(lambda x: under(TABLE, token_entropy(logits_of(x))[:, 1:]))
    same(actual, gradient(next_token_entropy))
    assert float(next_token_entropy(TABLE)) == pytest.approx(float(answers_entropy(TABLE)))
    assert bias(actual, gradient(answers_entropy)) > 0.1


def test_value_loss_pulls_to_the_true_values_and_the_clip_lets_go():
    reward_ST = token_rewards(REWARD_S, torch.zeros(S, T).double(), MASK_ST, 0.0)
    return_ST = advantages.discounted_returns(reward_ST, MASK_ST)
    exact = visits() * (VALUE_N - true_values(reward_ST))

    def pull(old_N: Tensor, clip: float | None) -> Tensor:
        return gradient(
            lambda x: under(TABLE, clipped_value_loss(x[STATE_ST], old_N[STATE_ST], return_ST, clip=clip)), VALUE_N
        )

    same(pull(VALUE_N, None), exact)
    same(pull(VALUE_N, 0.2), exact)  # nothing has moved yet
    # V stands 0.3 above the range's end: returns above the middle, V - 0.15, are further from there, and let go
    error_ST = (VALUE_N[STATE_ST] - return_ST) * (return_ST < VALUE_N[STATE_ST] - 0.15)
    by_hand = (
        torch.zeros(STATES)
        .double()
        .index_put_((STATE_ST,), PROBABILITY_S[:, None] * MASK_ST * error_ST, accumulate=True)
    )
    clipped = pull(VALUE_N - 0.5, 0.2)
    same(clipped, by_hand)
    assert bias(clipped, exact) > 0.1
