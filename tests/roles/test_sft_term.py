"""The supervised part of the policy's loss: its gradient, its rows, its metrics, and ranks that share it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.stream import Part
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.sft_term import SFTRows, SFTTerm
from tests.steps import one_step


def example(prompt: int, *ids: int) -> TokenizedExample:
    """The first `prompt` ids are not learned."""
    return TokenizedExample(ids, tuple(place >= prompt for place in range(len(ids))))


# Every row of another length; one that is learned from its first token on, which nothing predicts.
EXAMPLES = (
    example(2, 2, 3, 9, 1), example(1, 5, 8, 8, 4, 7, 2, 10, 1), example(1, 6, 1), example(0, 3, 3, 4),
    example(3, 7, 6, 5, 4, 1), example(1, 10, 9, 8, 1),
)  # fmt: skip


def term(coef: float = 0.3, *, batch_size: int = 6, budget: int = 1000, **settings) -> SFTTerm:
    rows = SFTRows(EXAMPLES, (Part("", len(EXAMPLES)),), batch_size)
    return SFTTerm(rows, SFT(0), coef=coef, seed=0, tokens_per_microbatch=budget, **settings)


def with_term(learner: Learner, *args, **settings) -> Learner:
    learner.sft = term(*args, **settings)
    return learner


def plain_nll(model: torch.nn.Module, examples) -> torch.Tensor:
    """Token by token: the mean of -log p over all learned tokens that something predicts."""
    losses = []
    for row in examples:
        logp_TV = torch.log_softmax(model(input_ids=torch.tensor([row.token_ids])).logits[0].float(), -1)
        losses += [-logp_TV[t - 1, row.token_ids[t]] for t in range(1, len(row.token_ids)) if row.learned[t]]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("budget", [1000, 1], ids=["one micro-batch", "a row each"])
@pytest.mark.parametrize("kind", ["qwen2", "lstm"])
def test_the_gradient_is_that_of_the_policy_loss_plus_coef_times_that_of_the_rows(
    tiny, learner_of, ragged, with_advantages, gradients_of, kind, budget
):
    batch, coef = with_advantages(ragged), 0.3
    policy = gradients_of(learner_of(tiny(kind)), batch)
    both = gradients_of(with_term(learner_of(tiny(kind)), coef, budget=budget), batch)
    model = tiny(kind)
    plain_nll(model, EXAMPLES).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(both[name], policy[name] + coef * parameter.grad, atol=1e-6, rtol=1e-5)
    assert max(float(parameter.grad.abs().max()) for parameter in model.parameters()) > 0.1


def test_the_two_are_clipped_together(tiny, learner_of, ragged, with_advantages, gradients_of):
    batch = with_advantages(ragged)
    both = gradients_of(with_term(learner_of(tiny())), batch)
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in both.values()))
    alone = one_step(learner_of(tiny()), batch, 0, 0.0)["grad_norm"]
    assert one_step(with_term(learner_of(tiny())), batch, 0, 0.0)["grad_norm"] == pytest.approx(norm, rel=1e-5) != alone


def test_what_is_measured(tiny, learner_of, ragged, with_advantages):
    """A model to which all 11 tokens are equally likely: ln 11 a token, whatever the coefficient."""
    model, batch = tiny(), with_advantages(ragged)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    learner = with_term(learner_of(model, epochs=2, minibatches=3, lr=1e-45), 0.3, batch_size=2)
    metrics = one_step(learner, batch.replace(logp_old=learner.logprobs(batch)), 0, 0.0)
    assert metrics["loss/sft"] == pytest.approx(math.log(11), rel=1e-6)
    # Six optimiser steps of two rows: each of the six rows twice, and 2 + 7 + 1 + 2 + 2 + 3 tokens to learn in them.
    assert metrics["sft/tokens"] == 2 * 17
    plain = one_step(learner_of(tiny()), batch, 0, 0.0)
    assert "loss/sft" not in plain and "sft/tokens" not in plain


def test_padding_of_these_rows_counts_too(tiny, learner_of, ragged, with_advantages):
    """35 tokens of rollouts in 54 places, and 26 of six rows in 6 x 8."""
    learner = with_term(learner_of(tiny(), tokens_per_microbatch=1000))
    padding = one_step(learner, with_advantages(ragged), 0, 0.0)["perf/padding_frac"]
    assert padding == pytest.approx(1 - (35 + 26) / (54 + 48))


def test_rows_come_by_the_number_of_the_optimiser_step(tiny, learner_of, ragged, with_advantages):
    """Also after a step that has ended early, and in a process that knows nothing of the steps before."""
    assert Counter(row for number in range(3) for row in term(batch_size=4).rows(number)) == dict.fromkeys(range(6), 2)
    seen: list[int] = []
    learner = with_term(learner_of(tiny(), epochs=2, minibatches=3, stop_kl=1e-9), batch_size=4)
    losses = learner.sft.losses
    learner.sft.losses = lambda engine, number: (seen.append(number), losses(engine, number))[1]
    batch = with_advantages(ragged)
    batch = batch.replace(logp_old=learner.logprobs(batch))
    one_step(learner, batch, 3, 0.0)
    assert seen == [18, 19], "the second has found the policy too far"
    one_step(learner, batch, 4, 0.0)
    assert seen[2] == 24


@pytest.mark.parametrize(("budget", "batch_size"), [(8, 6), (1000, 6), (8, 1)], ids=["ragged", "whole", "one row"])
def test_two_ranks_share_the_rows_and_make_the_same_calls(
    tiny, learner_of, ragged, with_advantages, gradients_of, one_of_two, budget, batch_size
):
    """Of one row, the second rank computes dummies only."""
    batch, learners = with_advantages(ragged), []
    whole = gradients_of(with_term(learner_of(tiny()), batch_size=batch_size), batch)
    for rank in range(2):
        learner = learner_of(None, engine=one_of_two(tiny(), rank), tokens_per_microbatch=7)
        learners.append(with_term(learner, batch_size=batch_size, budget=budget))
    told = [one_step(learner, batch, 0, 0.0) for learner in learners]
    engines = [learner.engine for learner in learners]
    assert engines[0].calls == engines[1].calls and engines[0].calls[-3:] == ["forward", "backward last", "step"]
    assert engines[0].calls.count("backward last") == 1
    grads = [{name: p.grad for name, p in engine.module.named_parameters()} for engine in engines]
    for name, expected in whole.items():
        torch.testing.assert_close(grads[0][name] + grads[1][name], expected, atol=1e-6, rtol=1e-5)
    rows = [EXAMPLES[row] for row in term(batch_size=batch_size).rows(0)]
    assert sum(metrics["sft/tokens"] for metrics in told) == sum(map(SFT(0).weight, rows))
    assert sum(metrics["loss/sft"] for metrics in told) == pytest.approx(plain_nll(tiny(), rows).item(), rel=1e-5)


def test_sources_come_by_their_weights():
    rows = SFTRows(EXAMPLES, (Part("a", 4, 1.0), Part("b", 2, 3.0)), 8)
    mixed = SFTTerm(rows, SFT(0), coef=1.0, seed=3, tokens_per_microbatch=99)
    for number in range(3):
        assert sum(row >= 4 for row in mixed.rows(number)) == 6, "of source b"
