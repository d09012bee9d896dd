import math

import pytest
import torch

from rlhf_ray.config.schema import CriticConfig
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.critic import Critic
from tests.steps import one_step

KINDS = ["qwen2", "gpt2", "lstm"]


@pytest.fixture
def critic_of(tiny):
    def make(kind="qwen2", **settings) -> Critic:
        config = CriticConfig(**{"lr": 1e-2, "max_grad_norm": 1e9, **settings})
        model = ValueModel(tiny(kind, sharpness=1.0).base_model)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            model.value_head.weight.copy_(torch.randn(model.value_head.weight.shape, generator=generator))
            model.value_head.bias.fill_(0.25)
        engine = TorchEngine(model, betas=config.betas, max_grad_norm=config.max_grad_norm)
        return Critic(engine, config, seed=0, total_steps=10)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_has_read_what_stands_before_its_token_and_no_more(critic_of, ragged, kind):
    critic = critic_of(kind)
    values = critic.values(ragged)
    for i, t in ragged.response_mask.nonzero().tolist():
        before = ragged.tokens[i : i + 1, :t]  # tokens 0 .. t-1
        expected = critic.engine.module(input_ids=before, attention_mask=torch.ones_like(before)).values[0, -1]
        assert values[i, t] == pytest.approx(float(expected.detach()), abs=1e-5), (i, t)
    assert (values[~ragged.response_mask] == 0).all()


def test_a_new_critic_says_0(tiny, ragged):
    engine = TorchEngine(ValueModel(tiny().base_model))
    assert (Critic(engine, CriticConfig(), seed=0, total_steps=1).values(ragged) == 0).all()


def test_the_value_loss_by_hand(critic_of, batch_of):
    """One token, value v, old value v - 1, return v - 3: the clipped value is v - 0.8, so plain wins: 9/2."""
    critic = critic_of(lr=1e-30)
    batch = batch_of([((2, 3), (4,))], group=1)
    value = float(critic.values(batch)[0, 2])
    old, target = torch.zeros(1, 3), torch.zeros(1, 3)
    old[0, 2], target[0, 2] = value - 1, value - 3
    metrics = one_step(critic, batch.replace(values=old, returns=target), 0)
    assert metrics["loss/value"] == pytest.approx(4.5, rel=1e-4)
    # Return v + 3: the clipped value v - 0.8 is farther off: 3.8^2 / 2.
    target[0, 2] = value + 3
    metrics = one_step(critic, batch.replace(values=old, returns=target), 0)
    assert metrics["loss/value"] == pytest.approx(7.22, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_lower_the_loss(critic_of, ragged, kind):
    critic = critic_of(kind, epochs=2, minibatches=3, value_clip=None)
    returns = torch.linspace(-1, 1, ragged.tokens.numel()).view(ragged.tokens.shape) * ragged.response_mask
    losses = []
    for step in range(8):
        batch = ragged.replace(values=critic.values(ragged), returns=returns)
        losses.append(one_step(critic, batch, step)["loss/value"])
    assert losses[-1] < 0.5 * losses[0] and losses[1] < losses[0]
    assert critic.engine.steps == 8 * 6


def test_the_microbatch_budget_does_not_change_the_update(critic_of, ragged):
    returns = ragged.response_mask.float()
    results = []
    for budget in (1, 14, 1000):
        critic = critic_of(tokens_per_microbatch=budget)
        values = critic.values(ragged)
        metrics = one_step(critic, ragged.replace(values=values, returns=returns), 0)
        results.append((metrics["loss/value"], metrics["critic/grad_norm"]))
    for loss, norm in results[:2]:
        assert loss == pytest.approx(results[2][0], rel=1e-5) and norm == pytest.approx(results[2][1], rel=1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_counted(critic_of, ragged):
    critic = critic_of(minibatches=3)
    returns = ragged.response_mask.float()
    returns[0, 2] = math.nan
    metrics = one_step(critic, ragged.replace(values=critic.values(ragged), returns=returns), 0)
    assert metrics["critic/skipped_steps"] == 1.0 and math.isfinite(metrics["critic/grad_norm"])
    assert critic.engine.steps == 2
    assert all(p.isfinite().all() for p in critic.engine.module.parameters())


def test_save_and_load(critic_of, ragged, tmp_path):
    one, other = critic_of(), critic_of()
    batch = ragged.replace(values=one.values(ragged), returns=ragged.response_mask.float())
    one_step(one, batch, 0)
    assert not torch.equal(one.values(ragged), other.values(ragged))
    one.save(tmp_path)
    other.load(tmp_path)
    first, second = one_step(one, batch, 1), one_step(other, batch, 1)
    for metrics in (first, second):
        metrics.pop("perf/peak_mem_gb")  # the process's, which only grows
    assert first == second
    assert torch.equal(one.values(ragged), other.values(ragged))
