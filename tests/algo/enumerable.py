"""A problem small enough to list everything that can happen.

Three tokens (0 ends the answer), at most three tokens an answer: 15 answers, 7 states, a table of 7 x 3 logits. So the
objective and its gradient are sums over 15 answers, and the expectation of an estimator over groups of three answers
is a sum over 15^3 groups: no confidence bound is needed to say "unbiased" or how large a bias is. Estimators that mix a
whole batch (whitening, token means) are summed over all batches of answers with three levels of reward.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import loss_weights
from rlhf_ray.algo.logprobs import token_logprobs

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
GRADED_S = REWARD_S.round().clamp(-1, 1) + 0.0  # three levels; no -0.0


def logits_of(table_NV: Tensor) -> Tensor:
    """logits_STV as a model gives them: those of token t stand one place before it."""
    return torch.cat([table_NV[STATE_ST], torch.zeros(S, 1, V).double()], 1)


def logprobs_of(table_NV: Tensor) -> Tensor:
    """logp_ST of every token of every answer, through the function that training uses."""
    padded_ST = torch.nn.functional.pad(TOKENS_ST, (1, 0))
    return token_logprobs(logits_of(table_NV), padded_ST)[:, 1:].masked_fill(~MASK_ST, 0.0)


def chance(table_NV: Tensor) -> Tensor:
    return logprobs_of(table_NV).sum(1).exp()


def gradient(function: Callable[[Tensor], Tensor], at: Tensor = TABLE) -> Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def objective_gradient(reward_S: Tensor) -> Tensor:
    """That of the mean reward."""
    return gradient(lambda x: (chance(x) * reward_S).sum())


OBJECTIVE, GRADED_OBJECTIVE = objective_gradient(REWARD_S), objective_gradient(GRADED_S)
PROBABILITY_S = chance(TABLE)
# d log p(token) / d logits = one-hot - softmax, in the row of the token's state
_SLOPE_STV = (torch.eye(V).double()[TOKENS_ST] - TABLE.softmax(-1)[STATE_ST]) * MASK_ST[..., None]
SCORE_STNV = torch.eye(STATES).double()[STATE_ST][..., None] * _SLOPE_STV[:, :, None, :]
SCORE_SNV = SCORE_STNV.sum(1)
GROUPS_GK = torch.tensor(list(itertools.product(range(S), repeat=K)))
GROUP_CHANCE_G = PROBABILITY_S[GROUPS_GK].prod(1)


def expectation(estimator: Callable[[Tensor, Tensor], Tensor], reward_S: Tensor = REWARD_S) -> Tensor:
    """Exact mean over all groups of K answers of (1/K) sum_i adv_i grad log p(answer_i)."""
    reward_B = reward_S[GROUPS_GK].flatten()
    group_B = torch.arange(len(GROUPS_GK)).repeat_interleave(K)
    weight_GK = GROUP_CHANCE_G[:, None] * estimator(reward_B, group_B).view(-1, K) / K
    return torch.einsum("gk,gknv->nv", weight_GK, SCORE_SNV[GROUPS_GK])


# f(rows_B, group_B) -> adv_BT: numbers of answers, and which of them belong together.
BatchEstimator = Callable[[Tensor, Tensor], Tensor]


def batch_expectation(estimator: BatchEstimator, groups: int, size: int = 1, *, lengths: bool = True) -> Tensor:
    """Exact mean over all batches of `groups` groups of `size` answers of (1/B) sum_it adv_it grad log p(token_it).

    For advantages that depend on an answer's graded reward and (with `lengths`) its length alone: answers that agree in
    these are one kind, and a batch without an order stands for all its orders.
    """
    kind_S = torch.stack([GRADED_S, MASK_ST.sum(1) * lengths], 1).unique(dim=0, return_inverse=True)[1]
    kinds = int(kind_S.max()) + 1
    example_C = torch.stack([(kind_S == c).nonzero()[0, 0] for c in range(kinds)])
    chance_C = torch.zeros(kinds).double().index_add(0, kind_S, PROBABILITY_S)
    weighted_STNV = PROBABILITY_S[:, None, None, None] * SCORE_STNV
    score_CTNV = torch.zeros(kinds, T, STATES, V).double().index_add(0, kind_S, weighted_STNV)
    score_CTNV = score_CTNV / chance_C[:, None, None, None]
    possible = list(itertools.combinations_with_replacement(range(kinds), size))
    chance_of = {group: orders(group) * float(chance_C[list(group)].prod()) for group in possible}
    group_B = torch.arange(groups).repeat_interleave(size)
    total = torch.zeros(STATES, V).double()
    for batch in itertools.combinations_with_replacement(possible, groups):
        kind_B = torch.tensor(batch).flatten()
        probability = orders(batch) * math.prod(chance_of[group] for group in batch)
        adv_BT = estimator(example_C[kind_B], group_B)
        total += probability * torch.einsum("bt,btnv->nv", adv_BT, score_CTNV[kind_B]) / len(kind_B)
    return total


def orders(things: Sequence[object]) -> int:
    """In how many orders they can stand."""
    return math.factorial(len(things)) // math.prod(math.factorial(n) for n in Counter(things).values())


def huge_batch(estimator: BatchEstimator, size: int = 2, groups: int = 200_000) -> Tensor:
    """The same for one batch in which every group stands as often as its chance says, up to a rounding of 1e-3."""
    possible = torch.tensor(list(itertools.product(range(S), repeat=size)))
    rows_B = possible.repeat_interleave((PROBABILITY_S[possible].prod(1) * groups).round().long(), dim=0).flatten()
    adv_BT = estimator(rows_B, torch.arange(len(rows_B) // size).repeat_interleave(size))
    weight_ST = torch.zeros(S, T).double().index_add(0, rows_B, adv_BT)
    return torch.einsum("st,stnv->nv", weight_ST, SCORE_STNV) / len(rows_B)


def under(table_NV: Tensor, loss_ST: Tensor, mode: str = "seq_sum_const") -> Tensor:
    """Exact expected loss of one answer drawn from `table_NV`."""
    weight_ST = loss_weights(MASK_ST, mode, total_tokens=1, total_sequences=1, constant=1)
    return ((loss_ST * weight_ST).sum(1) * chance(table_NV).detach()).sum()


def visits(table_NV: Tensor = TABLE) -> Tensor:
    """How often an answer passes through each state, on average."""
    on_ST = chance(table_NV).detach()[:, None] * MASK_ST
    return torch.zeros(STATES).double().index_put_((STATE_ST,), on_ST, accumulate=True)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def bias(actual: Tensor, expected: Tensor) -> float:
    """Size of what is wrong after the best rescaling, relative to what is right: 0 means parallel."""
    scale = (actual * expected).sum() / (expected**2).sum()
    return float((actual - scale * expected).norm() / (scale * expected).norm())


def constant_ST(x_S: Tensor) -> Tensor:
    return x_S[:, None].expand(S, T)
