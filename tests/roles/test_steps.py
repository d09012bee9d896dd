"""begin, learn, finish: in this order only, and the same numbers from all rows at once and from waves of them."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.config.schema import CriticConfig
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.stream import Part
from rlhf_ray.errors import ConfigError, DivergenceError, StepError
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.critic import Critic
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.sft_term import SFTRows, SFTTerm
from tests.steps import one_step

# Adam moves a weight whose gradient is nothing but rounding as far as any other: this is above the rounding.
EPS = 1e-4
WAVES = [[0, 1], [2, 3], [4, 5]]


def engine(model, **settings) -> TorchEngine:
    return TorchEngine(model, eps=EPS, max_grad_norm=0.5, **settings)


def distance(one: TorchEngine, other: TorchEngine) -> float:
    pairs = zip(one.export(), other.export(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for (_, a), (_, b) in pairs)


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """Without how the device was used: padding is another in other micro-batches."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.fixture
def critic_of(tiny):
    def make(**settings) -> Critic:
        model = ValueModel(tiny(sharpness=1.0).base_model)
        with torch.no_grad():
            model.value_head.weight.copy_(torch.linspace(-1, 1, 16)[None])
        return Critic(engine(model), CriticConfig(lr=1e-2, **settings), seed=0, total_steps=10)

    return make


@pytest.fixture
def batch(ragged, with_advantages):
    """What both roles learn from."""
    shape = ragged.tokens.shape
    spread = torch.linspace(-1, 1, shape.numel()).view(shape) * ragged.response_mask
    return with_advantages(ragged).replace(
        logp_ref=-2 * ragged.response_mask + spread, values=spread, returns=spread.flip(0) * ragged.response_mask
    )


# ---- the order --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["learner", "critic"])
def role(request, tiny, learner_of, critic_of):
    return critic_of() if request.param == "critic" else learner_of(tiny())


def began(role, step: int = 0, **more) -> None:
    role.begin(step, **({} if isinstance(role, Critic) else {"kl_coef": 0.0}), **more)


def test_only_one_order_is_accepted(role, batch):
    with pytest.raises(StepError, match=r"^learn: no step has begun; call begin"):
        role.learn(batch)
    with pytest.raises(StepError, match=r"^finish: no step has begun"):
        role.finish()
    began(role, 3)
    with pytest.raises(StepError, match=r"^begin\(4\): step 3 has begun and not ended; call finish\(\) first"):
        began(role, 4)
    role.learn(batch)
    with pytest.raises(StepError, match=r"^learn: step 3 has learned from its rows already.*streamed=True"):
        role.learn(batch)
    assert role.engine.steps == 1
    role.finish()
    with pytest.raises(StepError, match=r"^finish: no step has begun"):
        role.finish()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_step_without_rows_is_refused_and_over(role, batch, streamed):
    began(role, 0, streamed=streamed)
    with pytest.raises(StepError, match="step 0 has learned from nothing and is over"):
        role.finish()
    began(role, 1)
    role.learn(batch)
    assert len(role.finish()) > 0


def test_nothing_leaves_and_nothing_comes_within_a_step(role, batch, tiny, tmp_path):
    calls = {"save": [tmp_path / "a"], "load": [tmp_path / "a"]}
    if not isinstance(role, Critic):
        calls |= {"push_weights": [1], "export_model": [tmp_path / "b"], "export_adapter": [tmp_path / "c"]}
        role.connect(HFGenerator(tiny(), pad_token_id=0))
    role.save(tmp_path / "a")
    for learned in (False, True):
        began(role)
        if learned:
            role.learn(batch)
        for name, arguments in calls.items():
            with pytest.raises(StepError, match=rf"^{name}: step 0 has begun and not ended; call finish"):
                getattr(role, name)(*arguments)
        if learned:
            role.finish()
        else:
            with pytest.raises(StepError, match="learned from nothing"):
                role.finish()
    role.load(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- a step that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_a_step_that_was_cut_off_has_added_up_is_gone(tiny, learner_of, batch, dtype, streamed):
    """In a notebook ctrl-C ends it anywhere, and the next cell begins another."""
    one, other = (learner_of(None, engine=engine(tiny(), dtype=dtype), tokens_per_microbatch=12) for _ in range(2))
    backward, passes = one.engine.backward, []

    def interrupted(loss, *, last):
        if len(passes) == 2:
            loss.backward()  # the weights have their gradient, and nobody has taken it from there
            raise KeyboardInterrupt
        passes.append(loss)
        backward(loss, last=last)

    one.begin(0, 0.1, streamed=streamed)
    one.engine.backward = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.learn(batch)
    one.engine.backward = backward
    waves = WAVES if streamed else ()
    assert measured(one_step(one, batch, 0, 0.1, waves=waves)) == measured(one_step(other, batch, 0, 0.1, waves=waves))
    assert distance(one.engine, other.engine) == 0


def test_a_streamed_step_that_is_not_finite_is_skipped_and_counted(tiny, learner_of, batch):
    learner = learner_of(None, engine=engine(tiny()), max_skipped_steps=2)
    before = [tensor.clone() for _, tensor in learner.engine.export()]
    broken = batch.replace(advantages=batch.advantages * math.nan)
    metrics = one_step(learner, broken, 0, 0.0, waves=WAVES)
    assert metrics["skipped_steps"] == 1 and math.isnan(metrics["grad_norm"]) and learner.engine.steps == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, learner.engine.export(), strict=True))
    with pytest.raises(DivergenceError, match="last 2 optimiser steps"):
        one_step(learner, broken, 0, 0.0, waves=WAVES)
    one_step(learner, batch, 0, 0.0)
    assert learner.engine.steps == 1


# ---- waves ------------------------------------------------------------------------------------------------------


ALGORITHMS = {
    "token_mean": {"aggregation": "token_mean", "kl_coef": 0.1},
    "seq_mean": {"aggregation": "seq_mean", "kl_coef": 0.1, "entropy_coef": 0.02},
    "seq_sum_const": {"aggregation": "seq_sum_const", "correction": "truncate"},
    "gspo": {"name": "gspo", "correction": "mask", "correction_level": "sequence"},
}  # fmt: skip


@pytest.mark.parametrize("waves", [[[0, 1, 2, 3, 4, 5]], WAVES, [[4], [2, 0, 5], [3], [1]]], ids=["1", "3", "4"])
@pytest.mark.parametrize("case", ALGORITHMS)
def test_waves_are_one_step(tiny, learner_of, batch, gradients_of, case, waves):
    """Gradients, and over three steps metrics and weights, with clipping in force."""
    whole = gradients_of(learner_of(tiny(), ALGORITHMS[case]), batch, 0.1)
    parts = gradients_of(learner_of(tiny(), ALGORITHMS[case], tokens_per_microbatch=9), batch, 0.1, waves)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-2
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-6)
    one, other = (learner_of(None, ALGORITHMS[case], engine=engine(tiny())) for _ in range(2))
    for step in range(3):
        first, second = one_step(one, batch, step, 0.1), one_step(other, batch, step, 0.1, waves=waves)
        assert measured(second) == pytest.approx(measured(first), rel=1e-6, abs=1e-6)
        assert first["grad_norm"] > 0.5, "clipped"
    assert distance(one.engine, other.engine) < 1e-6


def test_waves_of_empty_answers_count_for_nothing(tiny, learner_of, batch_of):
    """Two answers in all, one of them empty: the mean over sequences is that of the other alone."""
    both = batch_of([((2, 3), (4, 5)), ((2, 3), ())]).replace(advantages=torch.tensor([1.0, -1.0]))
    metrics = [
        measured(one_step(learner_of(tiny(), {"aggregation": "seq_mean"}), rows, 0, 0.0, waves=waves))
        for rows, waves in ((both, [[0], [1]]), (both, [[1], [0]]), (both.select([0]), ()))
    ]
    assert metrics[0] == pytest.approx(metrics[2], abs=1e-6) and metrics[1] == pytest.approx(metrics[2], abs=1e-6)


@pytest.mark.parametrize("waves", [(), [[0, 1], [2]]], ids=["at once", "waves"])
def test_a_step_of_empty_answers_moves_nothing(tiny, learner_of, critic_of, batch_of, waves):
    rows = batch_of([((2, 3), ()), ((2, 3), ()), ((4,), ())])
    zero = torch.zeros(rows.tokens.shape)
    rows = rows.replace(advantages=torch.ones(3), values=zero, returns=zero, logp_ref=zero)
    learner, critic = learner_of(tiny(), {"kl_coef": 0.1}), critic_of()
    metrics = one_step(critic, rows, 0, waves=waves) | one_step(learner, rows, 0, 0.1, waves=waves)
    assert metrics["grad_norm"] == metrics["loss/policy"] == metrics["critic/grad_norm"] == metrics["ratio/max"] == 0
    assert distance(learner.engine, engine(tiny())) == 0


def test_waves_of_a_critic_are_one_step(critic_of, batch):
    one, other = critic_of(), critic_of(tokens_per_microbatch=9)
    for step in range(3):
        first, second = one_step(one, batch, step), one_step(other, batch, step, waves=WAVES)
        assert measured(second) == pytest.approx(measured(first), rel=1e-6, abs=1e-6)
        assert first["loss/value"] > 0 and first["critic/grad_norm"] > 0.5
    assert distance(one.engine, other.engine) < 1e-6


def test_the_supervised_rows_of_a_streamed_step_come_at_its_end(tiny, learner_of, batch, gradients_of):
    """Their mean is over their own tokens, however many the rollouts have."""
    examples = tuple(TokenizedExample(tuple(range(2, 4 + n)), tuple(i > 0 for i in range(2 + n))) for n in range(5))

    def learner(**settings):
        made = learner_of(tiny(), {"aggregation": "seq_mean"}, **settings)
        rows = SFTRows(examples, (Part("", 5),), batch_size=5)
        made.sft = SFTTerm(rows, SFT(0), coef=0.3, seed=0, tokens_per_microbatch=10)
        return made

    whole, parts = gradients_of(learner(), batch), gradients_of(learner(), batch, waves=WAVES)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-6)
    first, second = one_step(learner(), batch, 0, 0.0), one_step(learner(), batch, 0, 0.0, waves=WAVES)
    assert measured(second) == pytest.approx(measured(first), rel=1e-6, abs=1e-6) and first["loss/sft"] > 0


def test_what_is_asked_between_two_waves_changes_nothing(tiny, learner_of, batch):
    one, other = learner_of(tiny()), learner_of(tiny())
    for learner in (one, other):
        learner.begin(0, 0.1, streamed=True)
        for rows in WAVES:
            if learner is one:
                logp = learner.logprobs(batch)
            learner.learn(batch.select(rows))
    assert measured(one.finish()) == measured(other.finish()) and distance(one.engine, other.engine) == 0
    assert (one.logprobs(batch) - logp).abs().max() > 1e-3, "the weights move at the end"


def test_two_ranks_make_the_same_calls_in_every_wave(tiny, learner_of, batch, one_of_two, gradients_of):
    """Also in one whose rows are all the other's; the last pass is the boundary, and belongs to no wave."""
    waves = [[0], [1, 2, 3], [4, 5]]
    engines = [one_of_two(tiny(), rank) for rank in range(2)]
    found = [
        gradients_of(learner_of(None, engine=engine, tokens_per_microbatch=7), batch, waves=waves)
        for engine in engines
    ]
    assert engines[0].calls == engines[1].calls
    assert engines[0].calls[-2:] == ["forward", "backward last"] and engines[0].calls.count("backward last") == 1
    for name, gradient in gradients_of(learner_of(tiny()), batch).items():
        torch.testing.assert_close(found[0][name] + found[1][name], gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"minibatches": 4}])
def test_several_optimiser_steps_need_all_rows_at_once(tiny, learner_of, critic_of, settings):
    for role in (learner_of(tiny(), **settings), critic_of(**settings)):
        with pytest.raises(ConfigError, match=r"streamed step is one optimiser step.*epochs=\d and minibatches=\d"):
            began(role, streamed=True)
        began(role)
