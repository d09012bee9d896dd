"""Where in a step the numbers are not finite."""

import math

import pytest
import torch

from rlhf_ray.models.engine import build_engine
from rlhf_ray.roles.examine import NotFinite, columns_of, examine, forward_of
from tests.steps import one_step


@pytest.fixture
def batch(ragged, with_advantages):
    return with_advantages(ragged)


def test_columns_name_row_and_tokens(batch):
    assert columns_of(batch) == []
    spoiled = batch.advantages.clone()
    spoiled[0, 2:4] = math.nan
    spoiled[0, 0] = math.inf  # the prompt: nobody reads it
    score_B = torch.tensor([0, 1, -math.inf, 0, 0, 0])
    found = columns_of(batch.replace(advantages=spoiled, score=score_B))
    assert found == [NotFinite("score", 2, ()), NotFinite("advantages", 0, (2, 3))]


def test_a_ratio_may_overflow_where_log_probabilities_are_finite(batch):
    old = batch.logp_gen.clone()
    old[3, 1] = -200.0
    now = torch.zeros_like(old)
    assert forward_of(batch.replace(logp_old=old), now) == [NotFinite("ratio", 3, (1,))], "exp(200) is no float32"
    now[5, 4] = -math.inf
    found = forward_of(batch, now)
    assert found == [NotFinite("logp", 5, (4,))], "exp(-inf) is 0"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_optimiser_steps_are_those_of_the_run(tiny, learner_of, batch, ranks):
    shape = {"minibatches": 3, "epochs": 2, "tokens_per_microbatch": 16}
    run, again = learner_of(tiny(), **shape), learner_of(tiny(), **shape)
    batch = batch.replace(logp_old=run.logprobs(batch))
    metrics = one_step(run, batch, 0, 0.0)
    passes, norms = examine(again, batch, again.loss_of(0, 0.0), again.learning_rate(0), ranks)
    assert len(norms) == 6 and sum(norms) / 6 == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert {one.rank for one in passes} == set(range(ranks)) and all(one.finite for one in passes)
    of_first_epoch = sorted(row for one in passes if one.optimiser_step < 3 for row in one.rows)
    assert of_first_epoch == list(range(6))


def test_a_bad_row_is_found_in_its_micro_batch(tiny, learner_of, batch):
    spoiled = batch.advantages.clone()
    spoiled[4] = math.nan
    learner = learner_of(tiny(), tokens_per_microbatch=1000, max_skipped_steps=5)
    passes, norms = examine(learner, batch.replace(advantages=spoiled), learner.loss_of(0, 0.0), 0.1, ranks=2)
    assert [(set(one.rows) & {4}, one.bad_rows) for one in passes if not one.finite] == [({4}, (4,))]
    assert sum(one.finite for one in passes) == 1 and math.isnan(norms[0])


def test_looking_leaves_no_gradient(tiny):
    engine = build_engine("torch", tiny(), device="cpu", dtype=torch.float32)
    assert engine.gradient_norm() == 0.0
    engine.backward(3 * next(engine.module.parameters()).flatten()[0], last=True)
    assert engine.gradient_norm() == 3.0
    engine.discard()
    assert engine.gradient_norm() == 0.0
