"""The policy update against a plain re-derivation, and everything that must not change it."""

import copy
import math

import pytest
import torch

from rlhf_ray.config.algorithm import PRESETS
from rlhf_ray.errors import DivergenceError
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.division import Share
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.reference import Reference
from tests.steps import one_step

KINDS = ["qwen2", "gpt2", "lstm"]
LOSSES = {"grpo": {}, "ppo-like": {"kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 3.0}}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.engine.export()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- the first step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_starts_from_the_old_policy_exactly(tiny, learner_of, ragged, with_advantages, kind):
    metrics = one_step(learner_of(tiny(kind)), with_advantages(ragged), 0, 0.0)
    assert metrics["approx_kl"] == 0.0 and metrics["ratio/mean"] == 1.0 and metrics["ratio/max"] == 1.0
    assert metrics["clipfrac"] == 0.0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_logprobs_are_bit_equal_to_those_of_the_update(
    tiny, learner_of, ragged, with_advantages, kind, temperature
):
    """Several minibatches and micro-batches: with lr 0 nothing moves, so every ratio must be exactly 1."""
    learner = learner_of(
        tiny(kind), temperature=temperature, epochs=2, minibatches=3, tokens_per_microbatch=8, lr=1e-45
    )
    batch = with_advantages(ragged)
    metrics = one_step(learner, batch.replace(logp_old=learner.logprobs(batch)), 0, 0.0)
    assert metrics["approx_kl"] == 0.0 and metrics["ratio/mean"] == 1.0 and metrics["ratio/max"] == 1.0
    assert metrics["grad_norm"] > 0


def test_the_first_of_several_minibatches_is_exact_and_the_later_ones_move(
    tiny, learner_of, ragged, with_advantages
):
    learner = learner_of(tiny(), minibatches=3)
    batch = with_advantages(ragged)
    batch = batch.replace(logp_old=learner.logprobs(batch))
    first, second = learner.shares(batch)[:2]
    loss = lambda micro, share: learner._loss(micro, share, kl_coef=0.0, entropy_coef=0.0, first_epoch=True)  # noqa: E731
    _, totals = learner.optimiser_step(batch, first, loss, 1e-2)
    assert totals.values["approx_kl_sum"] == 0.0 and totals.values["ratio_max"] == 1.0
    _, totals = learner.optimiser_step(batch, second, loss, 1e-2)
    assert totals.values["approx_kl_sum"] > 1e-6 and totals.values["ratio_max"] > 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(tiny, learner_of, ragged, reference_logprobs, kind, temperature):
    ours = learner_of(tiny(kind), temperature=temperature, tokens_per_microbatch=10).logprobs(ragged)
    expected = reference_logprobs(tiny(kind), ragged, temperature).detach()
    assert (ours - expected).abs().max() < 1e-5
    assert (ours[~ragged.response_mask] == 0).all() and ours.dtype == torch.float32


def test_rows_of_different_temperatures(tiny, learner_of, ragged, reference_logprobs, with_advantages):
    """Each row's log-probabilities are those of the distribution it was drawn from, and its first ratio is 1."""
    own_B = torch.tensor([0.5, 2.0] * 3)
    batch = with_advantages(ragged).replace(temperature=own_B)
    learner = learner_of(tiny(), temperature=1.3, tokens_per_microbatch=10)
    ours = learner.logprobs(batch)
    for temperature in (0.5, 2.0):
        rows = own_B == temperature
        expected = reference_logprobs(tiny(), ragged, temperature).detach()
        assert (ours - expected)[rows].abs().max() < 1e-5
    metrics = one_step(learner, batch.replace(logp_gen=ours), 0, 0.0)
    assert metrics["ratio/max"] == 1 and metrics["approx_kl"] == 0 and metrics["mismatch/absdiff_max"] == 0
    reference = Reference(tiny(), temperature=1.3, tokens_per_microbatch=10)
    assert (reference.logprobs(batch) - ours).abs().max() < 1e-5


def test_given_answers_count_as_the_policys_own(tiny, learner_of, ragged, with_advantages, gradients_of):
    """Nobody knows how likely they were where they come from: no mismatch, no correction, a ratio that starts at 1."""
    batch = with_advantages(ragged)
    logp = learner_of(tiny()).logprobs(batch)
    given = batch.weight_version.clone()
    given[1] = -1
    written = logp.clone()
    written[1] = -99.0 * batch.response_mask[1]
    batch = batch.replace(weight_version=given, logp_gen=written)
    corrected = learner_of(tiny(), {"correction": "truncate"})
    assert distance(gradients_of(corrected, batch), gradients_of(learner_of(tiny()), batch)) < 1e-6
    metrics = one_step(corrected, batch, 0, 0.0)
    assert metrics["mismatch/absdiff_max"] < 1e-5 and metrics["ratio/max"] == 1


def test_given_answers_measure_nothing_of_the_policy(tiny, learner_of, ragged, with_advantages):
    """Neither how far the generator is off nor how far the policy is from the reference: a mean over its own tokens."""
    batch = with_advantages(ragged)
    logp = learner_of(tiny()).logprobs(batch)
    mask, given = batch.response_mask, batch.weight_version.clone()
    given[1] = -1
    off = torch.where(given < 0, 50.0, 0.1) * mask
    batch = batch.replace(weight_version=given, logp_gen=logp - 0.1 * mask, logp_ref=logp - off)
    metrics = one_step(learner_of(tiny()), batch, 0, 0.0)
    assert metrics["mismatch/absdiff_mean"] == pytest.approx(0.1, abs=1e-5)
    own = (mask & (given >= 0)).sum(1)
    assert metrics["kl_ref"] == pytest.approx(0.1 * float(own.sum() / (own > 0).sum()), abs=1e-4)


# ---- one update, derived again --------------------------------------------------------------------------------


def plain_loss(model, batch, reference_logprobs, *, kl_coef=0.0, entropy_coef=0.0, temperature=1.0) -> torch.Tensor:
    """PPO's objective, token by token: -min(rho A, clip(rho) A), plus KL to the reference, minus entropy."""
    logp = reference_logprobs(model, batch, temperature)
    total, tokens = 0.0, int(batch.response_mask.sum())
    for i, t in batch.response_mask.nonzero().tolist():
        rho = torch.exp(logp[i, t] - batch.logp_old[i, t])
        adv = batch.advantages[i, t]
        loss = -torch.minimum(rho * adv, rho.clamp(0.8, 1.2) * adv)
        if batch.logp_ref is not None:
            # half the squared log-ratio; its gradient counts as often as the policy would draw the token today
            kl = 0.5 * (logp[i, t] - batch.logp_ref[i, t]) ** 2
            loss = loss + kl_coef * (kl.detach() + rho.detach() * (kl - kl.detach()))
        if entropy_coef:
            row = batch.tokens[i : i + 1, : int(batch.lengths[i])]
            p = torch.log_softmax(model(input_ids=row).logits[0, t - 1].float() / temperature, -1)
            loss = loss + entropy_coef * (p.exp() * p).sum()
        total = total + loss / tokens
    return total


@pytest.mark.parametrize(
    ("kl_coef", "entropy_coef", "temperature"), [(0.0, 0.0, 1.0), (0.3, 0.0, 1.0), (0.0, 0.2, 1.0), (0.3, 0.2, 0.7)]
)
def test_an_update_is_adam_on_the_plain_objective(
    tiny, learner_of, ragged, with_advantages, reference_logprobs, kl_coef, entropy_coef, temperature
):
    batch = with_advantages(ragged)
    # An old policy a little away, so that some ratios are outside of [0.8, 1.2].
    old = reference_logprobs(tiny(seed=0), ragged, temperature).detach()
    noise = torch.linspace(-0.5, 0.5, old.numel()).view(old.shape) * ragged.response_mask
    batch = batch.replace(logp_old=old + noise)
    if kl_coef:
        batch = batch.replace(logp_ref=reference_logprobs(tiny(seed=3), ragged, temperature).detach())
    algorithm = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "kl_estimator": "k2"}
    learner = learner_of(tiny(), algorithm, temperature=temperature, tokens_per_microbatch=12)
    metrics = one_step(learner, batch, 0, kl_coef)

    plain = tiny()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    loss = plain_loss(
        plain, batch, reference_logprobs, kl_coef=kl_coef, entropy_coef=entropy_coef, temperature=temperature
    )
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in plain.parameters() if p.grad is not None))
    gradients = [p.grad for p in plain.parameters()]
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    total = metrics["loss/policy"] + kl_coef * metrics.get("loss/kl", 0) + entropy_coef * metrics.get("loss/entropy", 0)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    assert metrics["clipfrac"] > 0
    adam.step()
    mine = dict(learner.engine.module.named_parameters())
    for (name, theirs), gradient in zip(plain.named_parameters(), gradients, strict=True):
        # Adam's first step is the sign of the gradient: where that is almost 0, rounding decides.
        clear = gradient.abs() > 1e-5
        assert torch.allclose(mine[name][clear], theirs[clear], atol=1e-4), name
    assert distance(weights(learner), weights(learner_of(tiny()))) > 5e-3, "it did move"


def test_gradients_are_clipped_by_their_global_norm(tiny, learner_of, ragged, with_advantages):
    batch = with_advantages(ragged)
    free = learner_of(tiny())
    free.engine._optimizer.step = lambda: None
    clipped = learner_of(tiny(), max_grad_norm=0.25)
    seen = []
    clipped.engine._optimizer.step = lambda: seen.append(
        math.sqrt(sum(float((p.grad**2).sum()) for p in clipped.engine.module.parameters() if p.grad is not None))
    )
    norm = one_step(clipped, batch, 0, 0.0)["grad_norm"]
    assert norm == one_step(free, batch, 0, 0.0)["grad_norm"] > 0.25, "the norm that is reported is the one before"
    assert seen == [pytest.approx(0.25, rel=1e-4)]


# ---- what must not change the update --------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum_const"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_microbatch_budget_does_not_change_the_update(
    tiny, learner_of, ragged, with_advantages, kind, aggregation, gradients_of
):
    batch = with_advantages(ragged)
    algorithm = {"aggregation": aggregation}
    whole = gradients_of(learner_of(tiny(kind), algorithm, tokens_per_microbatch=1000), batch)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    for budget in (1, 14, 20):
        parts = gradients_of(learner_of(tiny(kind), algorithm, tokens_per_microbatch=budget), batch)
        assert distance(whole, parts) < 1e-6, budget


def test_gradient_checkpointing_does_not_change_the_update(tiny, learner_of, ragged, with_advantages, gradients_of):
    batch = with_advantages(ragged)
    plain = gradients_of(learner_of(tiny()), batch)
    model = tiny()
    engine = TorchEngine(model, gradient_checkpointing=True)
    learner = learner_of(model, engine=engine)
    batch = batch.replace(logp_old=learner.logprobs(batch))
    assert distance(plain, gradients_of(learner, batch)) < 1e-6
    assert one_step(learner, batch, 0, 0.0)["approx_kl"] == 0.0


def of_the_step(metrics: dict[str, float]) -> dict[str, float]:
    """Without the peak memory, which is the process's and grows with whatever ran before."""
    return {name: value for name, value in metrics.items() if name != "perf/peak_mem_gb"}


@pytest.mark.parametrize("share", [False, True], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("algorithm", LOSSES, ids=str)
def test_a_dummy_microbatch_adds_exactly_nothing(tiny, learner_of, ragged, with_advantages, algorithm, share):
    batch = with_advantages(ragged)
    batch = batch.replace(logp_ref=torch.full(batch.tokens.shape, -2.0) * batch.response_mask)
    plain, padded = (
        learner_of(tiny(), LOSSES[algorithm], tokens_per_microbatch=14, share_prompts=share) for _ in range(2)
    )
    shares = padded.shares

    def with_dummies(b) -> list[Share]:
        return [
            Share((*s.microbatches, ((0,),), ((5,),)), s.real, s.total_tokens, s.total_sequences) for s in shares(b)
        ]

    padded.shares = with_dummies
    first, second = one_step(plain, batch, 0, 0.1), one_step(padded, batch, 0, 0.1)
    assert second.pop("perf/padding_frac") > first.pop("perf/padding_frac")
    assert of_the_step(first) == of_the_step(second)
    assert distance(weights(plain), weights(padded)) == 0.0
    assert torch.equal(plain.logprobs(batch), padded.logprobs(batch))


@pytest.mark.parametrize(("budget", "padding"), [
    (1, 0.0),  # each row by itself
    (1000, 1 - 35 / 54),  # 6 + 4 + 7 + 2 + 7 + 9 tokens in one micro-batch of 6 rows, 9 wide
])
def test_padding_is_that_of_the_microbatches(tiny, learner_of, ragged, with_advantages, budget, padding):
    learner = learner_of(tiny(), tokens_per_microbatch=budget)
    assert ragged.lengths.tolist() == [6, 4, 7, 2, 7, 9]
    assert one_step(learner, with_advantages(ragged), 0, 0.0)["perf/padding_frac"] == pytest.approx(padding)


def test_a_dummy_microbatch_counts_as_padding(tiny, learner_of, ragged, with_advantages):
    learner = learner_of(tiny(), tokens_per_microbatch=1)
    shares = learner.shares
    learner.shares = lambda b: [Share((*s.microbatches, ((3,),)), s.real, s.total_tokens, s.total_sequences)
                                for s in shares(b)]  # fmt: skip
    assert one_step(learner, with_advantages(ragged), 0, 0.0)["perf/padding_frac"] == pytest.approx(1 - 35 / 37)


def test_terms_that_the_loss_does_not_have_are_reported(tiny, learner_of, ragged, with_advantages):
    """Without their coefficients; and they change nothing."""
    batch = with_advantages(ragged)
    plain = learner_of(tiny())
    metrics = one_step(plain, batch, 0, 0.0)
    assert metrics["loss/kl"] == 0 and metrics["loss/entropy"] == pytest.approx(-metrics["entropy"])
    # The KL in the reward: k1, the mean over tokens of logp - ref = logp + 3.
    learner = learner_of(tiny(), {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1})
    logp = learner.logprobs(ragged)
    metrics = one_step(learner, batch.replace(logp_ref=-3.0 * batch.response_mask, logp_old=logp), 0, 0.1)
    assert metrics["loss/kl"] == pytest.approx(float(logp.sum() / ragged.response_mask.sum()) + 3, rel=1e-5)
    assert distance(weights(plain), weights(learner)) == 0


@pytest.mark.parametrize("settings", [
    {"tokens_per_microbatch": 7},
    {"tokens_per_microbatch": 8, "share_prompts": True},  # the second rank's only answer is the longest
    {"tokens_per_microbatch": 99, "share_prompts": True},
])  # fmt: skip
def test_two_ranks_share_the_gradient_and_make_the_same_calls(
    tiny, learner_of, ragged, with_advantages, one_of_two, settings, gradients_of
):
    """The sum of both ranks' gradients is the gradient of one process, with equally many collectives."""
    batch = with_advantages(ragged)
    whole = gradients_of(learner_of(tiny()), batch)
    engines = [one_of_two(tiny(), rank) for rank in range(2)]
    for engine in engines:
        learner = learner_of(None, engine=engine, **settings)
        one_step(learner, batch, 0, 0.0)
    assert engines[0].calls == engines[1].calls
    assert engines[0].calls[-3:] == ["forward", "backward last", "step"]
    summed = {}
    for engine in engines:
        for name, p in engine.module.named_parameters():
            summed[name] = summed.get(name, 0) + p.grad
    assert distance(whole, summed) < 1e-6
    partial = [learner_of(None, engine=e, **settings).logprobs(batch) for e in engines]
    joined = partial[0] + partial[1]
    assert (joined - learner_of(tiny()).logprobs(batch)).abs().max() < 1e-5
    assert ((partial[0] != 0) & (partial[1] != 0)).sum() == 0, "each row is computed by one rank"


# ---- the algorithms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_an_update(tiny, learner_of, ragged, with_advantages, name):
    batch = with_advantages(ragged)
    learner = learner_of(tiny(), {"name": name})
    batch = batch.replace(logp_old=learner.logprobs(batch), logp_ref=learner.logprobs(batch) - 0.1)
    before = weights(learner)
    metrics = one_step(learner, batch, 0, learner.algorithm.kl_coef)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["kl_ref"] == pytest.approx(0.1 * 21 / 6, rel=1e-5), "21 tokens in 6 answers"
    assert distance(before, weights(learner)) > 0


def test_options_reach_the_loss(tiny, learner_of):
    learner = learner_of(tiny(), {"name": "dapo", "clip_low": 0.1, "dual_clip": 3.0})
    assert learner.policy_loss.options == {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 3.0}
    assert learner_of(tiny(), {"name": "reinforce"}).policy_loss.options == {}


def test_a_better_answer_becomes_likelier(tiny, learner_of, ragged, with_advantages):
    learner, batch = learner_of(tiny(), lr=1e-3), with_advantages(ragged)
    before = learner.logprobs(batch).sum(1)
    for step in range(5):
        one_step(learner, batch, step, 0.0)
    change = learner.logprobs(batch).sum(1) - before
    assert (change[::2] > 0).all() and (change[1::2] < 0).all()


def test_truncated_importance_weights_scale_the_loss(tiny, learner_of, ragged, with_advantages, gradients_of):
    """The generator was e^0.5 times less sure than the learner: every token counts min(e^0.5, 1.2)."""
    batch = with_advantages(ragged)
    learner = learner_of(tiny(), {"correction": "truncate", "correction_cap": 1.2})
    batch = batch.replace(logp_gen=learner.logprobs(batch) - 0.5 * batch.response_mask)
    weighted = gradients_of(learner, batch)
    plain = gradients_of(learner_of(tiny()), batch)
    assert distance({n: 1.2 * g for n, g in plain.items()}, weighted) < 1e-5
    metrics = one_step(learner_of(tiny()), batch, 0, 0.0)
    assert metrics["mismatch/absdiff_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["mismatch/kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5, rel=1e-4)
    assert metrics["mismatch/ess"] == pytest.approx(1.0, abs=1e-4)


def test_masked_importance_weights_drop_what_is_too_far_on_either_side(
    tiny, learner_of, ragged, with_advantages, gradients_of
):
    batch = with_advantages(ragged)
    logp = learner_of(tiny()).logprobs(batch)
    kept = gradients_of(learner_of(tiny(), {"correction": "mask", "correction_cap": 2.0}), batch.replace(logp_gen=logp))
    assert distance(kept, gradients_of(learner_of(tiny()), batch)) < 1e-5
    for gap in (-0.8, 0.8):  # e^0.8 = 2.2 is above 2, e^-0.8 = 0.45 below 1/2
        far = batch.replace(logp_gen=logp + gap * batch.response_mask)
        dropped = gradients_of(learner_of(tiny(), {"correction": "mask", "correction_cap": 2.0}), far)
        assert max(float(g.abs().max()) for g in dropped.values()) == 0.0


def test_entropy_is_that_of_the_sampling_distribution(tiny, learner_of, ragged, with_advantages):
    for temperature in (1.0, 0.5):
        total = 0.0
        for i, t in ragged.response_mask.nonzero().tolist():
            p = torch.softmax(tiny()(input_ids=ragged.tokens[i : i + 1, :t]).logits[0, -1] / temperature, -1)
            total += float(-(p * p.log()).sum().detach())
        metrics = one_step(learner_of(tiny(), temperature=temperature), with_advantages(ragged), 0, 0.0)
        assert metrics["entropy"] == pytest.approx(total / 21, rel=1e-4)


def test_the_entropy_coefficient_moves_over_the_run(tiny, learner_of, ragged, with_advantages):
    """Ten steps from 0 to 0.9: the third one's update is that of a constant 0.2."""
    weights = []
    for settings in ({"entropy_coef_end": 0.9}, {"entropy_coef": 0.2}, {}):
        model = tiny()
        one_step(learner_of(model, settings), with_advantages(ragged), 2, 0.0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert (weights[0] - weights[2]).abs().max() > 1e-3


@pytest.mark.parametrize(("stop_kl", "made"), [(1e9, 6), (1e-9, 2), (None, 6)])
def test_the_passes_end_once_the_policy_is_far_enough(tiny, learner_of, ragged, with_advantages, stop_kl, made):
    """The first minibatch is measured on the old policy itself, the second after one optimiser step."""
    engine = CountingSteps(tiny(), max_grad_norm=1e9)
    learner = learner_of(None, engine=engine, epochs=3, minibatches=2, lr=1e-2, stop_kl=stop_kl)
    batch = with_advantages(ragged)
    metrics = one_step(learner, batch.replace(logp_old=learner.logprobs(batch)), 0, 0.0)
    assert engine.calls == made
    assert metrics.get("optimiser_steps") == (None if stop_kl is None else made)


class CountingSteps(TorchEngine):
    calls = 0

    def step(self, lr, scale=1.0):
        self.calls += 1
        return super().step(lr, scale)


# ---- trouble --------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny, learner_of, ragged, with_advantages):
    batch = with_advantages(ragged)
    learner = learner_of(tiny(), minibatches=3)
    batch = batch.replace(logp_old=learner.logprobs(batch))
    poisoned = batch.advantages.clone()
    poisoned[0, 2] = math.nan  # group 0
    before = weights(learner)
    metrics = one_step(learner, batch.replace(advantages=poisoned), 0, 0.0)
    assert metrics["skipped_steps"] == 1.0 and math.isfinite(metrics["grad_norm"])
    after = weights(learner)
    assert learner.engine.steps == 2 and distance(before, after) > 0
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_when_every_step_is_skipped_nothing_changes(tiny, learner_of, ragged, with_advantages):
    batch = with_advantages(ragged)
    learner = learner_of(tiny())
    before = weights(learner)
    metrics = one_step(learner, batch.replace(advantages=batch.advantages * math.nan), 0, 0.0)
    assert metrics["skipped_steps"] == 1.0 and math.isnan(metrics["grad_norm"])
    assert distance(before, weights(learner)) == 0.0


def test_a_training_that_has_diverged_ends(tiny, learner_of, ragged, with_advantages, tmp_path):
    batch = with_advantages(ragged)
    broken = batch.replace(advantages=batch.advantages * math.nan)
    learner = learner_of(tiny(), max_skipped_steps=3)
    for advantages in (broken, broken, batch, broken, broken):  # a good step between them: counted anew
        one_step(learner, advantages, 0, 0.0)
    learner.save(tmp_path)
    restarted = learner_of(tiny(), max_skipped_steps=3)
    restarted.load(tmp_path)  # or a run that is started again and again would never end
    for one in (learner, restarted):
        with pytest.raises(DivergenceError, match=r"last 3 optimiser steps had no finite gradient .*_steps=3"):
            one_step(one, broken, 0, 0.0)
    (tmp_path / "skipped_steps.json").unlink()  # of an older version
    restarted.load(tmp_path)
    one_step(restarted, broken, 0, 0.0)


# ---- the learning rate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # lr 1, warm-up over steps 0-1, then 8 steps to step 10
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0}),
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.75, 6: 0.5, 10: 0.0, 12: 0.0}),
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 4: (1 + math.cos(math.pi / 4)) / 2, 10: 0.0}),
    ],
)
def test_learning_rates(tiny, learner_of, schedule, expected):
    learner = learner_of(tiny(), lr=1.0, lr_schedule=schedule, lr_warmup_steps=2)
    for step, lr in expected.items():
        assert learner.learning_rate(step) == pytest.approx(lr, abs=1e-12), step


@pytest.mark.parametrize(("settings", "expected"), [
    ({"lr_warmup_ratio": 0.4}, [0.25, 0.5, 0.75, 1.0, 1.0]),
    ({"lr_warmup_ratio": 0.11}, [0.5, 1.0, 1.0, 1.0, 1.0]),  # of 10 steps: 1.1, so two
    ({}, [1.0, 1.0, 1.0, 1.0, 1.0]),  # 3 % of 10 steps: the first, which has the whole rate
    ({"lr_warmup_ratio": 0.4, "lr_warmup_steps": 0}, [1.0, 1.0, 1.0, 1.0, 1.0]),
])  # fmt: skip
def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them(tiny, learner_of, settings, expected):
    learner = learner_of(tiny(), lr=1.0, **settings)
    assert [learner.learning_rate(step) for step in range(5)] == pytest.approx(expected)


def test_a_policy_that_waits_for_its_critic_has_its_whole_schedule(tiny, learner_of):
    learner = learner_of(tiny(), lr=1.0, lr_schedule="linear", lr_warmup_steps=2)
    learner.first_step = 6  # of 10
    assert [learner.learning_rate(step) for step in (6, 7, 8, 9, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_the_rate_is_used_and_reported(tiny, learner_of, ragged, with_advantages):
    learner = learner_of(tiny(), lr=1.0, lr_schedule="linear")
    before = weights(learner)
    assert one_step(learner, with_advantages(ragged), 10, 0.0)["lr"] == 0.0
    assert distance(before, weights(learner)) == 0.0


# ---- weights leave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_push_generator_and_learner_agree(tiny, learner_of, ragged, with_advantages, kind, tie):
    learner = learner_of(tiny(kind, tie_embeddings=tie, sharpness=1.0))
    generator = HFGenerator(tiny(kind, tie_embeddings=tie, sharpness=1.0), pad_token_id=0)
    learner.connect(generator)
    fixed = [[2, 3, 4, 5], [6, 7], [8, 9, 10, 2, 3, 4]]
    for step in range(3):
        one_step(learner, with_advantages(ragged), step, 0.0)
        stale = generator.logprobs(fixed)
        metrics = learner.push_weights(step + 1)
        assert metrics["sync/gb_per_s"] > 0
        ours, theirs = learner.canary_logprobs(fixed), generator.logprobs(fixed)
        assert [len(row) for row in ours] == [4, 2, 6] and generator.version == step + 1
        for mine, others, old in zip(ours, theirs, stale, strict=True):
            assert mine == pytest.approx(others, abs=1e-6) and mine != pytest.approx(old, abs=1e-4)


def test_a_lora_policy_without_its_adapter_is_the_reference(tiny, learner_of, ragged, with_advantages):
    learner, began = learner_of(apply_lora(tiny(), r=2)), learner_of(tiny())
    batch = with_advantages(ragged)
    for step in range(2):
        one_step(learner, batch, step, 0.0)
    assert (learner.reference_logprobs(batch) - began.logprobs(batch)).abs().max() < 1e-6
    moved = learner.logprobs(batch)
    assert (moved - began.logprobs(batch)).abs().max() > 1e-3, "and afterwards the adapter is there again"


def test_lora_trains_adapters_and_pushes_the_merged_weights(tiny, learner_of, ragged, with_advantages):
    base = tiny(sharpness=1.0)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = apply_lora(base, r=2, alpha=8.0, seed=1)
    learner = learner_of(model, lr=0.05)
    generator = HFGenerator(tiny(sharpness=1.0), pad_token_id=0)
    learner.connect(generator)
    batch = with_advantages(ragged)
    assert one_step(learner, batch, 0, 0.0)["approx_kl"] == 0.0
    one_step(learner, batch, 1, 0.0)
    assert learner.version == 0
    learner.push_weights(1)
    assert learner.version == generator.version == 1
    fixed = [[2, 3, 4, 5], [6, 7]]
    for mine, others in zip(learner.canary_logprobs(fixed), generator.logprobs(fixed), strict=True):
        assert mine == pytest.approx(others, abs=1e-5)
    before = HFGenerator(tiny(sharpness=1.0), pad_token_id=0).logprobs(fixed)[0]
    assert generator.logprobs(fixed)[0] != pytest.approx(before, abs=1e-3)
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in frozen:
            assert torch.equal(tensor, frozen[plain]), "the base is frozen"


def test_save_and_load_continue_bit_for_bit(tiny, learner_of, ragged, with_advantages, tmp_path):
    batch = with_advantages(ragged)
    one, other = learner_of(tiny()), learner_of(tiny(seed=4))
    one_step(one, batch, 0, 0.0)
    one.save(tmp_path)
    other.load(tmp_path)
    assert of_the_step(one_step(one, batch, 1, 0.0)) == of_the_step(one_step(other, batch, 1, 0.0))
    assert distance(weights(one), weights(other)) == 0.0


def test_a_batch_is_not_changed_by_an_update(tiny, learner_of, ragged, with_advantages):
    batch = with_advantages(ragged)
    kept = copy.deepcopy(batch)
    one_step(learner_of(tiny(), epochs=2), batch.replace(logp_old=torch.zeros(batch.tokens.shape)), 0, 0.0)
    assert torch.equal(batch.advantages, kept.advantages) and torch.equal(batch.tokens, kept.tokens)
