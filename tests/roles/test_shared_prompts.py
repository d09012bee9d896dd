"""Answers behind one copy of their prompt: by hand, and the numbers of rows that each have their own."""

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.reference import Reference
from rlhf_ray.roles.shared_prompts import MicroBatch, PromptSharing, lay_out, plan_lines
from tests.steps import one_step

KINDS = ["qwen2", "gpt2"]
WIDE = PromptSharing(hidden_size=1000)  # a token costs so much that sharing always pays


@pytest.fixture
def two_prompts(batch_of):
    """Prompt 5 6 with answers 7 | 8 9, prompt 4 with answer 3 2 1."""
    return batch_of([((5, 6), (7,)), ((5, 6), (8, 9)), ((4,), (3, 2, 1))])


# ---- by hand --------------------------------------------------------------------------------------------------


def test_rows_with_the_same_prompt_go_together_while_they_fit(two_prompts):
    rows = two_prompts.rows
    assert plan_lines(rows, range(3), 99) == ([(0,), (1,), (2,)], [3, 4, 4])
    assert plan_lines(rows, range(3), 4, WIDE) == ([(0,), (1,), (2,)], [3, 4, 4]), "2 + 1 + 2 tokens do not fit"
    assert plan_lines(rows, range(3), 5, WIDE) == ([(0, 1), (2,)], [5, 4])
    assert plan_lines(rows, [2, 0], 5, WIDE) == ([(0,), (2,)], [3, 4])


def test_equal_prompts_of_different_groups_share_too_and_others_of_a_group_do_not(batch_of):
    batch = batch_of([((5, 6), (7,)), ((5, 4), (7,)), ((5, 6), (8,))], group=3)
    assert plan_lines(batch.rows, range(3), 99, WIDE)[0] == [(0, 2), (1,)]


def test_a_group_that_does_not_fit_takes_several_lines(batch_of):
    batch = batch_of([((5, 6), (7, 8))] * 5, group=5)
    assert plan_lines(batch.rows, range(5), 6, WIDE) == ([(0, 1), (2, 3), (4,)], [6, 6, 4])


def test_there_is_a_line_for_each_rank(batch_of):
    batch = batch_of([((5, 6), (7, 8))] * 8, group=8)
    lines = {ranks: plan_lines(batch.rows, range(8), 99, WIDE, ranks)[0] for ranks in (1, 2, 3, 8)}
    assert [len(line) for line in lines[1]] == [8] and [len(line) for line in lines[2]] == [4, 4]
    assert [len(line) for line in lines[3]] == [3, 3, 2] and [len(line) for line in lines[8]] == [1] * 8


def test_sharing_pays_for_long_prompts_and_not_for_long_answers():
    # A line of 300, prompt and answer of 100: 400^2 - 300^2 - 200^2 = 30,000 more pairs, 100 tokens fewer.
    assert not PromptSharing(hidden_size=50).pays(300, 100, 100), "6 * 50 * 100 = 30,000"
    assert PromptSharing(hidden_size=51).pays(300, 100, 100)
    model = PromptSharing(hidden_size=4096)
    assert model.pays(8000, prompt=1000, answer=500) and not model.pays(2100, prompt=100, answer=2000)


def test_the_layout(two_prompts):
    shared = MicroBatch.of(two_prompts, [(0, 1), (2,)])
    layout = lay_out(shared)
    assert layout.tokens_GL.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert layout.positions_GL.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 0]]
    assert layout.place_BT.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 7, 8]]
    assert layout.visible_G1LL[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # the second answer does not see the first
        [1, 1, 0, 1, 1],
    ]
    assert shared.line_tokens == [5, 4] and MicroBatch.of(two_prompts, [(0,), (2,)]).line_tokens == [3, 4]
    assert torch.equal(shared.select([2]).tokens, two_prompts.select([2]).tokens), "rows of it are a batch as any other"


def test_an_answer_without_tokens(batch_of):
    batch = batch_of([((5, 6), ()), ((5, 6), (7,)), ((5, 6), ())], group=3)
    assert plan_lines(batch.rows, range(3), 9, WIDE) == ([(0, 1, 2)], [3])
    layout = lay_out(MicroBatch.of(batch, [(0, 1, 2)]))
    assert layout.tokens_GL.tolist() == [[5, 6, 7]]
    assert layout.place_BT.tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 0]]


# ---- the same numbers -----------------------------------------------------------------------------------------


def distance(one, other) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("budget", [1, 8, 12, 1000])  # all alone, two groups share, all do, one micro-batch
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_update_are_those_of_separate_rows(
    tiny, learner_of, ragged, reference_logprobs, with_advantages, kind, budget
):
    """Two epochs over two minibatches, with entropy and KL terms, at a temperature of the row's own."""
    batch = with_advantages(ragged).replace(temperature=torch.tensor([0.5, 2.0] * 3))
    settings = {"epochs": 2, "minibatches": 2, "lr": 1e-3}
    algorithm = {"kl_coef": 0.1, "kl_in": "loss", "entropy_coef": 0.05}
    # A key's bias has a gradient of 0 but for rounding, which Adam with eps 1e-8 blows up to steps of lr.
    engines = [TorchEngine(tiny(kind), eps=1e-6, max_grad_norm=1e9) for _ in range(2)]
    plain = learner_of(None, algorithm, engine=engines[0], **settings)
    shared = learner_of(
        None, algorithm, engine=engines[1], **settings, share_prompts=True, tokens_per_microbatch=budget
    )
    logp = shared.logprobs(batch)
    expected = torch.where(
        (torch.arange(6) % 2 == 0)[:, None], *(reference_logprobs(tiny(kind), ragged, t).detach() for t in (0.5, 2.0))
    )
    assert (logp - expected).abs().max() < 1e-5

    batch = batch.replace(logp_ref=expected - 0.1 * ragged.response_mask)
    one = one_step(plain, batch.replace(logp_old=plain.logprobs(batch)), 0, 0.1)
    other = one_step(shared, batch.replace(logp_old=logp), 0, 0.1)
    for name in ("grad_norm", "entropy", "loss/policy", "loss/kl", "approx_kl", "kl_ref"):
        assert other[name] == pytest.approx(one[name], abs=1e-5), name
    assert distance(dict(plain.engine.export()), dict(shared.engine.export())) < 1e-5


def test_old_logprobs_are_bit_equal_to_those_of_the_update(tiny, learner_of, ragged, with_advantages):
    learner = learner_of(tiny(), share_prompts=True, epochs=2, minibatches=3, tokens_per_microbatch=8, lr=1e-45)
    batch = with_advantages(ragged)
    metrics = one_step(learner, batch.replace(logp_old=learner.logprobs(batch)), 0, 0.0)
    assert metrics["approx_kl"] == 0.0 and metrics["ratio/mean"] == 1.0 and metrics["ratio/max"] == 1.0


def test_with_lora(tiny, learner_of, ragged, with_advantages):
    models = [apply_lora(tiny(), r=2, seed=1) for _ in range(2)]
    plain, shared = (learner_of(m, share_prompts=share) for m, share in zip(models, (False, True), strict=True))
    for learner in (plain, shared):
        one_step(learner, with_advantages(ragged), 0, 0.0)
    assert distance(dict(plain.engine.export()), dict(shared.engine.export())) < 1e-5
    assert distance(dict(plain.engine.export()), dict(tiny().state_dict())) > 1e-4, "it has learned"


def test_with_gradient_checkpointing_and_in_bfloat16(tiny, ragged, with_advantages, learner_of):
    batch = with_advantages(ragged)
    norms = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for share in (False, True):
            engine = TorchEngine(tiny(), max_grad_norm=1e9, gradient_checkpointing=True, dtype=dtype)
            learner = learner_of(None, engine=engine, share_prompts=share)
            norms[name, share] = one_step(learner, batch, 0, 0.0)["grad_norm"]
    assert norms["float32", True] == pytest.approx(norms["float32", False], rel=1e-5)
    assert norms["bfloat16", True] == pytest.approx(norms["bfloat16", False], rel=0.05)


def test_the_reference_policy_shares_too(tiny, ragged):
    settings = {"temperature": 0.7, "tokens_per_microbatch": 12}
    plain, shared = (Reference(tiny(), **settings, share_prompts=share).logprobs(ragged) for share in (False, True))
    assert (plain - shared).abs().max() < 1e-5 and plain.min() < -1


# ---- and less to compute --------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once(tiny, learner_of, batch_of):
    batch = batch_of([((2, 3, 4, 5, 6, 7), (8 + i % 3, 1)) for i in range(4)], group=4)
    batch = batch.replace(advantages=torch.ones_like(batch.logp_gen))
    learner = learner_of(tiny(), share_prompts=True, tokens_per_microbatch=14)
    seen = []
    learner.engine.module.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    metrics = one_step(learner, batch, 0, 0.0)
    assert [tuple(shape) for shape in seen] == [(1, 14)], "6 + 4 * 2 tokens; separate rows would be 4 of 8"
    assert metrics["perf/padding_frac"] == 0


def test_nothing_to_share_is_an_ordinary_pass(tiny, learner_of, batch_of):
    """One answer a prompt: no dense mask, so that the fast attention kernels still apply."""
    learner = learner_of(tiny(), share_prompts=True)
    masks = []
    learner.engine.module.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"].dim()), with_kwargs=True
    )
    learner.logprobs(batch_of([((2, 3), (4, 5)), ((2, 4), (4, 5))]))
    learner.logprobs(batch_of([((2, 3), (4, 5)), ((2, 3), (6, 5))]))
    assert masks == [2, 4]


# ---- what cannot share ----------------------------------------------------------------------------------------


def test_models_without_plain_attention_are_refused(tiny, learner_of):
    def refused(model, reason):
        with pytest.raises(ConfigError, match=f"has .*{reason}.*; set learner.share_prompts=false"):
            learner_of(model, share_prompts=True)

    refused(tiny("lstm"), "a recurrent state")
    stateful = tiny()
    stateful._is_stateful = True
    refused(stateful, "a recurrent state")
    sliding = tiny()
    sliding.config.layer_types = ["sliding_attention"]
    refused(sliding, "sliding_attention")
    window = tiny("gpt2")  # as in Mistral's config, which has no layer_types
    window.config.sliding_window = 16
    refused(window, "a sliding window of 16 tokens")
    alibi = tiny("gpt2")
    alibi.config.alibi = True
    refused(alibi, "ALiBi")
    eager = tiny()
    eager.set_attn_implementation("eager")
    refused(eager, "the attention kernel 'eager'")
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 12}
    refused(BartForCausalLM(BartConfig(**sizes)), "no input for positions")
