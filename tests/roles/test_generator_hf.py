"""Rollouts: keyed to the request, and honest about their probabilities."""

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, Lfm2Config, MambaConfig, MiniMaxConfig

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.errors import SyncError
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.protocols import Request, Sampling

KINDS = ["qwen2", "gpt2", "lstm"]
PROMPTS = [(2, 3, 4), (5,), (6, 7, 8, 9, 10), (2, 3), (9,), (4, 4, 4, 4)]


def requests(prompts=PROMPTS) -> list[Request]:
    return [Request(i // 2, i, tuple(p), seed=1000003 * i + 17, columns={"row": i}) for i, p in enumerate(prompts)]


@pytest.fixture
def generator(tiny):
    def make(kind="qwen2", **settings) -> HFGenerator:
        return HFGenerator(tiny(kind), pad_token_id=0, **settings)

    return make


def completions(batch) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(batch.tokens, batch.response_mask, strict=True)]


# ---- which tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_batch_size_order_or_neighbours(generator, kind):
    asked, sampling = requests(), Sampling(8, stop_token_ids=(1,))
    together = completions(generator(kind).generate(asked, sampling))
    assert len({tuple(c) for c in together}) > 3, "they do differ"
    assert completions(generator(kind, batch_size=1).generate(asked, sampling)) == together
    assert completions(generator(kind, batch_size=4).generate(asked, sampling)) == together
    assert completions(generator(kind).generate(asked[::-1], sampling)) == together[::-1]
    alone = [completions(generator(kind).generate([request], sampling))[0] for request in asked]
    assert alone == together


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_of_a_group_runs_through_the_model_once(generator, reference_logprobs, tiny, kind):
    sampler, sampling = generator(kind), Sampling(8, stop_token_ids=(1,))
    seen = []
    sampler.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    asked = requests([prompt for prompt in PROMPTS for _ in range(4)])
    batch = sampler.generate(asked, sampling)
    first = seen.index((6, 5))  # before it the model was asked what it keeps
    assert 12 < seen[first + 1][0] <= 24 and {width for _, width in seen[first + 1 :]} == {1}
    alone = [completions(generator(kind).generate([request], sampling))[0] for request in asked]
    assert completions(batch) == alone
    assert (batch.logp_gen - reference_logprobs(tiny(kind), batch).detach()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["convolutions", "state beside attention", "only a state", "a cache of its own"])
def test_a_group_of_a_model_that_keeps_more_than_keys_and_values(kind):
    shape = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = {
        "convolutions": lambda: Lfm2Config(**shape, **heads, layer_types=["conv", "full_attention"]),
        "state beside attention": lambda: FalconH1Config(
            **shape, **heads, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4
        ),
        "only a state": lambda: MambaConfig(**shape, state_size=4),
        "a cache of its own": lambda: MiniMaxConfig(**shape, **heads, head_dim=8, num_local_experts=2),
    }[kind]()
    torch.manual_seed(0)
    sampler = HFGenerator(AutoModelForCausalLM.from_config(config), pad_token_id=0)
    asked = requests([prompt for prompt in PROMPTS[:3] for _ in range(3)])
    together = completions(sampler.generate(asked, Sampling(4)))
    assert together == [completions(sampler.generate([request], Sampling(4)))[0] for request in asked]
    assert len({tuple(answer) for answer in together}) > 3


def test_tokens_depend_on_the_seed_and_on_nothing_that_happened_before(generator):
    sampler, sampling = generator(), Sampling(8)
    first = completions(sampler.generate(requests(), sampling))
    torch.manual_seed(99)
    assert completions(sampler.generate(requests(), sampling)) == first
    other = [Request(r.prompt_id, r.sample_id, r.token_ids, r.seed + 1) for r in requests()]
    assert completions(sampler.generate(other, sampling)) != first


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_argmax(generator, tiny, kind):
    batch = generator(kind).generate(requests(), Sampling(6, temperature=0))
    model = tiny(kind)
    for i in range(len(batch)):
        row = batch.tokens[i : i + 1, : int(batch.lengths[i])]
        best = model(input_ids=row, attention_mask=torch.ones_like(row)).logits.argmax(-1)[0, :-1]
        mask = batch.response_mask[i, 1 : row.shape[1]]
        assert row[0, 1:][mask].tolist() == best[mask].tolist()


# ---- honest probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logp_gen_is_that_of_a_transformers_forward(generator, tiny, reference_logprobs, kind, temperature):
    batch = generator(kind).generate(requests(), Sampling(8, temperature=temperature, stop_token_ids=(1,)))
    expected = reference_logprobs(tiny(kind), batch, temperature).detach()
    assert (batch.logp_gen - expected).abs().max() < 1e-5
    assert expected[batch.response_mask].min() < -1, "unlikely tokens are among them"


def test_the_models_own_generation_settings_do_not_bend_the_distribution(tiny, reference_logprobs):
    model = tiny()
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.eos_token_id = [1, 4, 5, 6, 7]
    model.generation_config.suppress_tokens = [2, 3]
    batch = HFGenerator(model, pad_token_id=0).generate(requests(), Sampling(8, stop_token_ids=(1,)))
    assert (batch.logp_gen - reference_logprobs(tiny(), batch).detach()).abs().max() < 1e-5
    plain = HFGenerator(tiny(), pad_token_id=0).generate(requests(), Sampling(8, stop_token_ids=(1,)))
    assert completions(batch) == completions(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_given_tokens(generator, tiny, kind):
    rows = [[2, 3, 4, 5, 6], [7, 8], [9]]
    ours = generator(kind).logprobs(rows)
    for row, logps in zip(rows, ours, strict=True):
        ids = torch.tensor([row])
        expected = token_logprobs(tiny(kind)(input_ids=ids).logits, ids)[0].tolist()
        assert logps == pytest.approx(expected, abs=1e-5) and logps[0] == 0


# ---- bookkeeping ----------------------------------------------------------------------------------------------


def test_eos_ends_a_row_and_the_limit_truncates(generator):
    sampler = generator()
    free = completions(sampler.generate(requests(), Sampling(6)))
    stop = free[0][2]  # a token that row 0 samples third
    batch = sampler.generate(requests(), Sampling(6, stop_token_ids=(stop,)))
    for row, (ids, unstopped) in enumerate(zip(completions(batch), free, strict=True)):
        if stop in unstopped:
            assert ids == unstopped[: unstopped.index(stop) + 1] and not batch.truncated[row], "EOS is kept"
        else:
            assert ids == unstopped and len(ids) == 6 and batch.truncated[row]
    assert not batch.truncated[0] and batch.rows.response_lengths[0] <= 3


def test_two_stop_tokens_and_none(generator):
    sampler = generator()
    free = completions(sampler.generate(requests(), Sampling(6)))
    batch = sampler.generate(requests(), Sampling(6, stop_token_ids=(free[0][1], free[1][1])))
    assert [len(c) <= 2 for c in completions(batch)[:2]] == [True, True]
    assert sampler.generate(requests(), Sampling(3)).truncated.all()


def test_the_layout_of_what_comes_back(generator):
    batch = generator().generate(requests(), Sampling(4))
    for row, prompt in enumerate(PROMPTS):
        assert batch.tokens[row, : len(prompt)].tolist() == list(prompt), "prompts on the left, no padding between"
        assert not batch.response_mask[row, : len(prompt)].any()
    assert batch.prompt_id.tolist() == [0, 0, 1, 1, 2, 2] and batch.sample_id.tolist() == list(range(6))
    assert [c["row"] for c in batch.columns] == list(range(6))


def test_no_requests(generator):
    with pytest.raises(ValueError, match="no requests"):
        generator().generate([], Sampling(4))


# ---- weights --------------------------------------------------------------------------------------------------


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_new_weights_are_used_and_tagged(generator, tiny):
    sampler, other = generator(), tiny(seed=5)
    before = completions(sampler.generate(requests(), Sampling(6)))
    tensors = state(other)
    sampler.init_weight_transfer_engine({"transport": "in_process"})
    sampler.start_weight_update()
    sampler.update_weights({"names": list(tensors), "tensors": list(tensors.values()), "index": 0, "last": True})
    sampler.finish_weight_update("4")
    batch = sampler.generate(requests(), Sampling(6))
    assert sampler.version == 4 and set(batch.rows.weight_version) == {4}
    assert completions(batch) != before
    assert completions(batch) == completions(HFGenerator(other, pad_token_id=0).generate(requests(), Sampling(6)))


@pytest.mark.parametrize("use", ["generate", "logprobs"])
def test_a_half_updated_generator_refuses_to_work(generator, tiny, use):
    sampler, tensors = generator(), state(tiny(seed=5))
    name = next(iter(tensors))
    sampler.start_weight_update()
    sampler.update_weights({"names": [name], "tensors": [tensors[name]], "index": 0, "last": False})
    for _ in range(2):
        with pytest.raises(SyncError, match="replace this generator"):
            sampler.generate(requests(), Sampling(2)) if use == "generate" else sampler.logprobs([[2, 3]])
