"""Answers behind one copy of their prompt: by hand, and the numbers of rows that each have their own."""

import copy

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.packing import pack, pack_numbers, packed_sizes, plan_packs
from rlhf_ray.roles.reference import Reference

KINDS = ["qwen2", "gpt2"]


@pytest.fixture
def two_prompts(batch_of):
    """Prompt 5 6 with answers 7 | 8 9, prompt 4 with answer 3 2 1."""
    return batch_of([((5, 6), (7,)), ((5, 6), (8, 9)), ((4,), (3, 2, 1))])


def packed(batch, max_tokens):
    packs, _ = plan_packs(batch, range(len(batch)), max_tokens)
    batch = batch.replace(pack=pack_numbers(batch, packs))
    return batch.select([row for rows in packs for row in rows])


# ---- by hand --------------------------------------------------------------------------------------------------


def test_rows_with_the_same_prompt_go_together_while_they_fit(two_prompts):
    assert plan_packs(two_prompts, range(3), 0) == ([[0], [1], [2]], [3, 4, 4])
    assert plan_packs(two_prompts, range(3), 4) == ([[0], [1], [2]], [3, 4, 4]), "2 + 1 + 2 tokens do not fit"
    assert plan_packs(two_prompts, range(3), 5) == ([[0, 1], [2]], [5, 4])
    assert plan_packs(two_prompts, [2, 0], 5) == ([[0], [2]], [3, 4])


def test_equal_prompts_of_different_groups_share_too_and_others_of_a_group_do_not(batch_of):
    batch = batch_of([((5, 6), (7,)), ((5, 4), (7,)), ((5, 6), (8,))], group=3)
    assert plan_packs(batch, range(3), 99)[0] == [[0, 2], [1]]


def test_the_layout(two_prompts):
    layout = pack(packed(two_prompts, 5))
    assert layout.tokens_GL.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert layout.positions_GL.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 0]]
    assert layout.where_BT.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 7, 8]]
    assert layout.visible_G1LL[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # the second answer does not see the first
        [1, 1, 0, 1, 1],
    ]
    assert packed_sizes(packed(two_prompts, 5)) == [5, 4] and packed_sizes(two_prompts) == [3, 4, 4]


def test_an_answer_without_tokens(batch_of):
    batch = packed(batch_of([((5, 6), ()), ((5, 6), (7,)), ((5, 6), ())]), 9)
    layout = pack(batch)
    assert layout.where_BT.shape == batch.tokens.shape
    assert [layout.tokens_GL.flatten()[i].item() for i in layout.where_BT[1]] == [5, 6, 7]


# ---- the same numbers -----------------------------------------------------------------------------------------


def distance(one, other) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("budget", [1, 12, 1000])
@pytest.mark.parametrize("limit", [7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_update_are_those_of_separate_rows(
    tiny, learner_of, ragged, reference_logprobs, with_advantages, kind, limit, budget
):
    """Two epochs over two minibatches, with entropy and KL terms, at a temperature of the row's own."""
    batch = with_advantages(ragged).replace(temperature=torch.tensor([0.5, 2.0] * 3))
    settings = {"epochs": 2, "minibatches": 2, "lr": 1e-3}
    algorithm = {"kl_coef": 0.1, "kl_in": "loss", "entropy_coef": 0.05}
    # A key's bias has a gradient of 0 but for rounding, which Adam with eps 1e-8 blows up to steps of lr.
    engines = [TorchEngine(tiny(kind), eps=1e-6, max_grad_norm=1e9) for _ in range(2)]
    plain = learner_of(None, algorithm, engine=engines[0], **settings)
    packing = {"shared_prompt_tokens": limit, "tokens_per_microbatch": budget}
    shared = learner_of(None, algorithm, engine=engines[1], **settings, **packing)
    logp = shared.logprobs(batch)
    expected = torch.where(
        (torch.arange(6) % 2 == 0)[:, None], *(reference_logprobs(tiny(kind), ragged, t).detach() for t in (0.5, 2.0))
    )
    assert (logp - expected).abs().max() < 1e-5

    batch = batch.replace(logp_ref=expected - 0.1 * ragged.response_mask)
    one = plain.update(batch.replace(logp_old=plain.logprobs(batch)), 0, 0.1)
    other = shared.update(batch.replace(logp_old=logp), 0, 0.1)
    for name in ("grad_norm", "entropy", "loss/policy", "loss/kl", "approx_kl", "kl_ref"):
        assert other[name] == pytest.approx(one[name], abs=1e-5), name
    assert distance(dict(plain.engine.export()), dict(shared.engine.export())) < 1e-5


def test_old_logprobs_are_bit_equal_to_those_of_the_update(tiny, learner_of, ragged, with_advantages):
    learner = learner_of(tiny(), shared_prompt_tokens=64, epochs=2, minibatches=3, tokens_per_microbatch=8, lr=1e-45)
    batch = with_advantages(ragged)
    metrics = learner.update(batch.replace(logp_old=learner.logprobs(batch)), 0, 0.0)
    assert metrics["approx_kl"] == 0.0 and metrics["ratio/mean"] == 1.0 and metrics["ratio/max"] == 1.0


def test_with_lora(tiny, learner_of, ragged, with_advantages):
    models = [apply_lora(tiny(), r=2, seed=1) for _ in range(2)]
    plain, shared = (learner_of(m, shared_prompt_tokens=n) for m, n in zip(models, (0, 64), strict=True))
    for learner in (plain, shared):
        learner.update(with_advantages(ragged), 0, 0.0)
    assert distance(dict(plain.engine.export()), dict(shared.engine.export())) < 1e-5
    assert distance(dict(plain.engine.export()), dict(tiny().state_dict())) > 1e-4, "it has learned"


def test_the_reference_policy_shares_too(tiny, ragged):
    settings = {"temperature": 0.7, "tokens_per_microbatch": 12}
    plain, shared = (Reference(tiny(), **settings, pack_tokens=n).logprobs(ragged) for n in (0, 64))
    assert (plain - shared).abs().max() < 1e-5 and plain.min() < -1


# ---- and less to compute --------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once(tiny, learner_of, batch_of):
    batch = batch_of([((2, 3, 4, 5, 6, 7), (8 + i % 3, 1)) for i in range(4)], group=4)
    batch = batch.replace(advantages=torch.ones_like(batch.logp_gen))
    learner = learner_of(tiny(), shared_prompt_tokens=14)
    seen = []
    learner.engine.module.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    metrics = learner.update(batch, 0, 0.0)
    assert [tuple(shape) for shape in seen] == [(1, 14)], "6 + 4 * 2 tokens; separate rows would be 4 of 8"
    assert metrics["perf/padding_frac"] == 0


def test_a_dummy_microbatch_adds_nothing(tiny, learner_of, ragged, with_advantages):
    """A rank that has run out repeats a packed row without a response."""
    batch = with_advantages(ragged)
    learner = learner_of(tiny(), shared_prompt_tokens=64, tokens_per_microbatch=14)
    share = learner.shares(batch)[0]
    first = share.microbatches[0]
    twice = copy.deepcopy(share.__dict__) | {"microbatches": (*share.microbatches, first)}
    dummy = list(type(share)(**twice).batches(batch))[-1]
    loss, _ = learner._loss(dummy, share, kl_coef=0.0, first_epoch=True)
    assert loss.item() == 0 and pack(dummy).where_BT.shape == dummy.tokens.shape


# ---- what cannot share ----------------------------------------------------------------------------------------


def test_models_without_plain_attention_are_refused(tiny, learner_of):
    with pytest.raises(ConfigError, match="recurrent state; set learner.shared_prompt_tokens=0"):
        learner_of(tiny("lstm"), shared_prompt_tokens=64)
    sliding = tiny()
    sliding.config.layer_types = ["sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention"):
        learner_of(sliding, shared_prompt_tokens=64)
    eager = tiny()
    eager.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="eager"):
        learner_of(eager, shared_prompt_tokens=64)
