"""Expected gradients against exact ones, on a problem small enough to list everything that can happen.

Three tokens (0 ends the answer), at most three tokens an answer: 15 answers, 7 states, a table of 7 x 3 logits. So the
objective and its gradient are sums over 15 answers, and the expectation of an estimator over groups of three answers
is a sum over 15^3 groups: no confidence bound is needed to say "unbiased" or how large a bias is. A Monte Carlo test
at the end takes the sampled road through the same functions, with bounds.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlhf_ray.algo import advantages
from rlhf_ray.algo.aggregation import loss_totals, loss_weights
from rlhf_ray.algo.corrections import importance_weights
from rlhf_ray.algo.kl import kl_estimate, kl_loss
from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.algo.policy_losses import cispo_loss, clipped_loss, policy_gradient_loss
from rlhf_ray.algo.shaping import token_rewards

T, V, K = 3, 3, 3


def list_answers() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_ST, mask_ST, state_ST): every answer, and the row of the logit table each token is drawn from."""
    answers = []
    for tokens in itertools.product(range(V), repeat=T):
        end = tokens.index(0) + 1 if 0 in tokens else T
        if all(t == 0 for t in tokens[end:]):  # one padding for each answer
            answers.append((tokens, end))
    prefixes = sorted({tokens[:t] for tokens, end in answers for t in range(end)}, key=lambda p: (len(p), p))
    number = {prefix: n for n, prefix in enumerate(prefixes)}
    tokens_ST = torch.tensor([tokens for tokens, _ in answers])
    mask_ST = torch.tensor([[t < end for t in range(T)] for _, end in answers])
    state_ST = torch.tensor([[number[a[:t]] if t < end else 0 for t in range(T)] for a, end in answers])
    return tokens_ST, mask_ST, state_ST


TOKENS_ST, MASK_ST, STATE_ST = list_answers()
S, STATES = len(TOKENS_ST), int(STATE_ST.max()) + 1
GENERATOR = torch.Generator().manual_seed(11)
TABLE, STALE, REFERENCE = (torch.randn(STATES, V, generator=GENERATOR).double() for _ in range(3))
STALE = TABLE + 0.4 * STALE
REWARD_S = torch.randn(S, generator=GENERATOR).double()
VALUE_N = torch.randn(STATES, generator=GENERATOR).double()  # a wrong critic


def logprobs_of(table_NV: Tensor) -> Tensor:
    """logp_ST of every token of every answer, through the function that training uses."""
    shifted_STV = torch.cat([table_NV[STATE_ST], torch.zeros(S, 1, V).double()], 1)
    padded_ST = torch.nn.functional.pad(TOKENS_ST, (1, 0))
    return token_logprobs(shifted_STV, padded_ST)[:, 1:].masked_fill(~MASK_ST, 0.0)


def chance(table_NV: Tensor) -> Tensor:
    return logprobs_of(table_NV).sum(1).exp()


def gradient(function, table_NV: Tensor = TABLE) -> Tensor:
    leaf = table_NV.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


OBJECTIVE = gradient(lambda x: (chance(x) * REWARD_S).sum())
PROBABILITY_S = chance(TABLE)
SCORE_SNV = torch.stack([gradient(lambda x, s=s: logprobs_of(x)[s].sum()) for s in range(S)])
GROUPS_GK = torch.tensor(list(itertools.product(range(S), repeat=K)))
GROUP_CHANCE_G = PROBABILITY_S[GROUPS_GK].prod(1)


def expectation(estimator, reward_S: Tensor = REWARD_S) -> Tensor:
    """Exact mean over all groups of K answers of (1/K) sum_i adv_i grad log p(answer_i)."""
    reward_B = reward_S[GROUPS_GK].flatten()
    group_B = torch.arange(len(GROUPS_GK)).repeat_interleave(K)
    weight_GK = GROUP_CHANCE_G[:, None] * estimator(reward_B, group_B).view(-1, K) / K
    return torch.einsum("gk,gknv->nv", weight_GK, SCORE_SNV[GROUPS_GK])


def under(table_NV: Tensor, loss_ST: Tensor, mode: str = "seq_sum_const") -> Tensor:
    """Exact expected loss of one answer drawn from `table_NV`."""
    weight_ST = loss_weights(MASK_ST, mode, total_tokens=1, total_sequences=1, constant=1)
    return ((loss_ST * weight_ST).sum(1) * chance(table_NV).detach()).sum()


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def bias(actual: Tensor, expected: Tensor) -> float:
    """Size of what is wrong after the best rescaling, relative to what is right: 0 means parallel."""
    scale = (actual * expected).sum() / (expected**2).sum()
    return float((actual - scale * expected).norm() / (scale * expected).norm())


def constant_ST(x_S: Tensor) -> Tensor:
    return x_S[:, None].expand(S, T)


def test_the_list_is_complete():
    assert (S, STATES) == (15, 7)
    assert PROBABILITY_S.sum().item() == pytest.approx(1.0) and GROUP_CHANCE_G.sum().item() == pytest.approx(1.0)
    same((PROBABILITY_S[:, None, None] * SCORE_SNV).sum(0), torch.zeros(STATES, V).double())


# ---- advantages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "scale"), [
    (advantages.rloo, 1.0),
    (lambda r, g: advantages.reinforce(r, g, baseline=0.7), 1.0),
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


@pytest.mark.parametrize("k", [2, 3])
def test_pass_at_k_has_the_gradient_of_the_best_of_k(k):
    tuples = torch.tensor(list(itertools.product(range(S), repeat=k)))
    best = REWARD_S[tuples].amax(1)
    exact = gradient(lambda x: (chance(x)[tuples].prod(1) * best).sum())
    same(expectation(lambda r, g: advantages.pass_at_k(r, g, k=k)), exact)
    assert bias(exact, OBJECTIVE) > 0.2, "another objective than the mean reward"


def gae_gradient(value_N: Tensor, lam: float) -> Tensor:
    reward_ST = token_rewards(REWARD_S, torch.zeros(S, T).double(), MASK_ST, 0.0)
    adv_ST, _ = advantages.gae(reward_ST, value_N[STATE_ST], MASK_ST, 1.0, lam)
    return gradient(lambda x: -under(TABLE, policy_gradient_loss(logprobs_of(x), None, adv_ST, MASK_ST)))


def test_gae_is_unbiased_with_lambda_1_or_a_true_critic():
    reward_ST = token_rewards(REWARD_S, torch.zeros(S, T).double(), MASK_ST, 0.0)
    on = PROBABILITY_S[:, None] * MASK_ST
    mass_N = torch.zeros(STATES).double().index_put_((STATE_ST,), on, accumulate=True)
    togo_ST = advantages.discounted_returns(reward_ST, MASK_ST)
    true_N = torch.zeros(STATES).double().index_put_((STATE_ST,), on * togo_ST, accumulate=True) / mass_N
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
    on = chance(states).detach()[:, None] * MASK_ST
    visits_N = torch.zeros(STATES).double().index_put_((STATE_ST,), on, accumulate=True)
    ours, theirs = table_NV.log_softmax(-1), REFERENCE.log_softmax(-1)
    kl_NV = ours.exp() * (ours - theirs) if reverse else theirs.exp() * (theirs - ours)
    return (visits_N * kl_NV.sum(-1)).sum()


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


# ---- losses and aggregation -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [clipped_loss, cispo_loss, policy_gradient_loss])
def test_losses_on_fresh_data_have_the_objectives_gradient(loss):
    old_ST = logprobs_of(TABLE)
    same(gradient(lambda x: -under(TABLE, loss(logprobs_of(x), old_ST, constant_ST(REWARD_S), MASK_ST))), OBJECTIVE)


def test_means_over_tokens_or_sequences_weigh_by_length():
    old_ST = logprobs_of(TABLE)

    def mean(mode):
        return gradient(
            lambda x: -under(TABLE, clipped_loss(logprobs_of(x), old_ST, constant_ST(REWARD_S), MASK_ST), mode)
        )

    assert bias(mean("seq_sum_const"), OBJECTIVE) < 1e-6
    length_S = MASK_ST.sum(1)
    same(mean("seq_mean"), torch.einsum("s,snv->nv", PROBABILITY_S * REWARD_S / length_S, SCORE_SNV))
    assert bias(mean("seq_mean"), OBJECTIVE) > 0.05


# ---- stale data -------------------------------------------------------------------------------------------


PRESETS = {
    "no correction": None,
    "token": {"level": "token", "mode": "none"},
    "sequence": {"level": "sequence", "mode": "none"},
    "sequence, capped at 2": {"level": "sequence", "mode": "truncate", "high": 2.0},
    "sequence, masked outside 1/2..2": {"level": "sequence", "mode": "mask", "low": 0.5, "high": 2.0},
    "geometric": {"level": "geometric", "mode": "none"},
}


def stale_error(preset: dict | None, problem: int) -> float:
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
        return -under(old_NV, policy_gradient_loss(logprobs_of(x), None, adv_ST, MASK_ST) * weight_ST)

    return float((gradient(objective, now_NV) - exact).norm() / exact.norm())


def test_corrections_remove_the_bias_of_stale_data():
    """Mean over 20 random problems. Measured: 0.34, 0.21, 0.00, 0.03, 0.18, 0.19 in the order of PRESETS."""
    error = {name: sum(stale_error(preset, p) for p in range(20)) / 20 for name, preset in PRESETS.items()}
    assert error["no correction"] > 0.3, "the bias must be visible"
    assert error["sequence"] < 1e-6, "gone"
    assert error["sequence, capped at 2"] < 0.05, "a cap pays for bounded weights with a little bias"
    for name in ("token", "geometric", "sequence, masked outside 1/2..2"):
        assert 0.1 < error[name] < 0.75 * error["no correction"], f"{name}: smaller, not gone"


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
