"""Real vLLM on CPU. Three engines, started one after the other, for all tests here."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rlhf_ray.batch import Batch
from rlhf_ray.config.vllm_limits import OWN_ENGINE_ARGS
from rlhf_ray.errors import ConfigError, DataError, ModelError, SyncError
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles import generator_vllm
from rlhf_ray.roles.generator_vllm import VLLMGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sync.canary import Canary, canary_tokens
from rlhf_ray.sync.factory import make_sender
from rlhf_ray.sync.sender import WeightSender

pytestmark = [pytest.mark.engine, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]

VOCAB = 37
BOUND = 1e-4
STOP = 1


@dataclass
class Case:
    model: torch.nn.Module
    generator: VLLMGenerator
    sender: WeightSender
    version: int = 0

    def sync(self, model: torch.nn.Module) -> None:
        self.version += 1
        self.sender.send(lambda: plain_state(model), self.generator, self.version)


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Other weights, far enough that logits move by nats."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def hf_logprobs(model: torch.nn.Module, rows, temperature: float = 1.0) -> list[list[float]]:
    """One unpadded forward pass a row: nothing in common with vLLM's batching."""
    out = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].float() / temperature
        logp = logits.log_softmax(-1)
        out.append([0.0] + [float(logp[t - 1, row[t]]) for t in range(1, len(row))])
    return out


def largest_difference(one, other) -> float:
    return max(abs(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


def requests(count: int) -> list[Request]:
    draw = random.Random(5)
    return [
        Request(i // 4, i, tuple(draw.randrange(2, VOCAB) for _ in range(1 + i % 9)), seed=draw.getrandbits(62))
        for i in range(count)
    ]


# tied and untied embeddings, both kinds of transformer, both transports
CASES = [
    ("qwen2", True, "shared_memory"),
    ("gpt2", False, "in_process"),
    ("gpt2", True, "shared_memory"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{'tied' if c[1] else 'untied'}-{c[2]}")
def case(request, tmp_path_factory):
    kind, tied, transport = request.param
    model = build_scratch(
        kind, vocab_size=VOCAB, hidden_size=64, layers=2, heads=2, max_length=96, tie_embeddings=tied, seed=3
    )
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    generator = VLLMGenerator(str(folder), transport=transport, max_model_len=96, kv_cache_gb=0.25)
    assert torch.equal(before, torch.get_rng_state())  # starting vLLM draws nothing from the learner's numbers
    sender = make_sender(transport, bucket_mb=0.05)
    yield Case(model, generator, sender)
    generator.close()
    sender.close()


def test_before_any_sync_it_has_the_folders_weights(case):
    rows = canary_tokens(VOCAB, count=3, length=20)
    assert case.generator.version == 0
    assert largest_difference(case.generator.logprobs(rows), hf_logprobs(case.model, rows)) < BOUND


def test_equal_to_the_learner_after_each_of_three_syncs(case):
    canary = Canary(canary_tokens(VOCAB, count=4, length=16), bound=BOUND)
    rows = [[2, 3, 4, 5, 6, 7, 8], [9, 9, 9], [5]]
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    for seed in (1, 2, 3):
        old = case.generator.logprobs(rows)
        case.generator.generate(requests(8), sampling)  # fills the prefix cache with the old weights
        perturb(case.model, seed)
        case.sync(case.model)
        expected = hf_logprobs(case.model, rows)
        assert largest_difference(old, expected) > 0.1  # the weights did change
        assert largest_difference(case.generator.logprobs(rows), expected) < BOUND
        (verdict,) = canary.check([case.generator], hf_logprobs(case.model, canary.tokens), case.version)
        assert verdict.ok, verdict
        batch = case.generator.generate(requests(8), sampling)
        check_samples(case.model, batch, temperature=1.0)
        assert set(batch.weight_version[batch.response_mask].tolist()) == {case.version}


def check_samples(model, batch: Batch, temperature: float) -> None:
    """logp_gen is the log-probability of each sampled token under the learner's weights."""
    for i in range(len(batch)):
        row = batch.tokens[i][batch.attention_mask[i]].tolist()
        (expected,) = hf_logprobs(model, [row], temperature)
        mask = batch.response_mask[i][: len(row)]
        difference = (batch.logp_gen[i][: len(row)] - torch.tensor(expected))[mask].abs().max()
        assert difference < BOUND
    assert (batch.logp_gen[~batch.response_mask] == 0).all()


def test_lora_merged_export(case, tmp_path):
    kind = case.model.config.model_type
    base = build_scratch(
        kind,
        vocab_size=VOCAB,
        hidden_size=64,
        layers=2,
        heads=2,
        max_length=96,
        tie_embeddings=case.model.config.tie_word_embeddings,
        seed=8,
    )
    adapted = apply_lora(base, r=4, alpha=8.0)
    rows = canary_tokens(VOCAB, count=2, length=12, seed=4)
    for seed in (1, 2, 3):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        case.sync(adapted)
        assert largest_difference(case.generator.logprobs(rows), hf_logprobs(adapted, rows)) < BOUND


def test_temperature_and_truncated_sampling_report_what_was_sampled_from(case):
    case.sync(case.model)
    batch = case.generator.generate(requests(6), Sampling(max_new_tokens=5, temperature=0.7))
    check_samples(case.model, batch, temperature=0.7)
    # With top_k=1 only one token is possible: probability 1 after renormalisation, and it is the greedy one.
    forced = case.generator.generate(requests(6), Sampling(max_new_tokens=5, temperature=0.7, top_k=1))
    assert forced.logp_gen.abs().max() < 1e-6
    greedy = case.generator.generate(requests(6), Sampling(max_new_tokens=5, temperature=0.0))
    assert torch.equal(forced.tokens, greedy.tokens)


def test_members_of_different_temperatures_and_given_answers(case):
    case.sync(case.model)
    own = [0.5, 2.0, 0.0, 1.0] * 3
    asked = [replace(r, temperature=t) for r, t in zip(requests(12), own, strict=True)]
    asked[3] = replace(asked[3], temperature=None, answer=(2, 3, STOP))
    sampling = Sampling(12, temperature=1.0, stop_token_ids=(STOP,))
    batch = case.generator.generate(asked, sampling)
    assert batch.sample_id.tolist() == list(range(12))
    assert batch.rows.weight_version == (*[case.version] * 3, -1, *[case.version] * 8)
    assert batch.tokens[3][batch.response_mask[3]].tolist() == [2, 3, STOP]
    for temperature in (0.5, 2.0, 1.0):
        rows = [i for i in range(12) if own[i] == temperature and i != 3]
        check_samples(case.model, batch.select(rows), temperature=temperature)
        assert rows_of(batch.select(rows)) == rows_of(
            case.generator.generate([requests(12)[i] for i in rows], replace(sampling, temperature=temperature))
        )
    greedy = case.generator.generate([asked[i] for i in (2, 6, 10)], replace(sampling, temperature=0.0))
    assert rows_of(greedy) == rows_of(batch.select([2, 6, 10]))


def test_tokens_do_not_depend_on_the_rest_of_the_batch(case):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, stop_token_ids=(STOP,))
    everything = requests(40)
    whole = rows_of(case.generator.generate(everything, sampling))
    shuffled = random.Random(0).sample(everything, len(everything))
    assert rows_of(case.generator.generate(shuffled, sampling)) == whole
    for chunk in (everything[:1], everything[7:10], everything[20:]):
        alone = rows_of(case.generator.generate(chunk, sampling))
        assert alone == {i: whole[i] for i in alone}
    other = [Request(r.prompt_id, r.sample_id, r.token_ids, r.seed + 1) for r in everything]
    assert rows_of(case.generator.generate(other, sampling)) != whole


def rows_of(batch: Batch) -> dict[int, list[int]]:
    return {int(s): t[m].tolist() for s, t, m in zip(batch.sample_id, batch.tokens, batch.attention_mask, strict=True)}


def test_stop_tokens_and_the_truncated_flag(case):
    sampling = Sampling(max_new_tokens=30, temperature=1.5, stop_token_ids=(STOP, 7))
    batch = case.generator.generate(requests(40), sampling)
    for i, request in enumerate(requests(40)):
        completion = batch.tokens[i][batch.response_mask[i]].tolist()
        row = batch.tokens[i][batch.attention_mask[i]].tolist()
        assert row == [*request.token_ids, *completion]
        assert bool(batch.truncated[i]) == (completion[-1] not in (STOP, 7))
        assert not set(completion[:-1]) & {STOP, 7}
        assert len(completion) == 30 or not batch.truncated[i]
    assert 0 < int(batch.truncated.sum()) < 40
    # the folder's own EOS does not count unless it is named
    free = case.generator.generate(requests(40), Sampling(max_new_tokens=30, temperature=1.5))
    assert free.truncated.all() and bool((free.tokens[free.response_mask] == STOP).any())


def test_bad_requests_are_refused_before_vllm_cuts_them_short(case):
    long = Request(0, 0, tuple([3] * 90), seed=1)
    with pytest.raises(DataError, match="prompt 0 has 90 tokens, with 10 new ones more than max_model_len=96"):
        case.generator.generate([long], Sampling(max_new_tokens=10))
    assert case.generator.generate([long], Sampling(max_new_tokens=6)).response_mask.sum() == 6
    with pytest.raises(DataError, match="prompt 1 is empty"):
        case.generator.generate([long, Request(0, 1, (), seed=1)], Sampling(max_new_tokens=6))
    with pytest.raises(DataError, match="no requests"):
        case.generator.generate([], Sampling(max_new_tokens=6))
    with pytest.raises(ConfigError, match=r"from 0 to 2.0, not 2.5; change rollout.temperature"):
        case.generator.generate([long], Sampling(max_new_tokens=6, temperature=2.5))
    with pytest.raises(DataError):
        case.generator.logprobs([[3] * 96])


def test_sleep_does_nothing_on_cpu(case):
    case.generator.sleep()
    assert case.generator.logprobs([[2, 3]])
    case.generator.wake()


def test_update_cut_half_way_or_with_a_hole(case):
    """The last test of each engine: it breaks it."""
    names = [name for name, _ in plain_state(case.model)]
    broken = names[-1] if case.model.config.tie_word_embeddings else names[0]

    def cut():
        for name, tensor in plain_state(case.model):
            if name == names[len(names) // 2]:
                raise RuntimeError("learner died")
            yield name, tensor

    def hole():
        yield from ((n, t) for n, t in plain_state(case.model) if n != broken)

    with pytest.raises(SyncError, match="learner died|other tensors than in the update before"):
        case.sender.send(cut if case.model.config.model_type == "qwen2" else hole, case.generator, 99)
    assert case.generator.version != 99
    with pytest.raises(SyncError, match="cannot generate.*replace this generator"):
        case.generator.generate(requests(1), Sampling(max_new_tokens=2))
    with pytest.raises(SyncError, match="replace this generator"):
        case.sync(case.model)
    with pytest.raises(SyncError):
        case.generator.logprobs([[2, 3]])


@pytest.fixture
def small(tmp_path: Path):
    """An engine of its own, for what must be its first sync."""
    model = build_scratch("qwen2", vocab_size=VOCAB, hidden_size=32, layers=1, heads=1, max_length=64)
    model.save_pretrained(tmp_path)
    generator = VLLMGenerator(str(tmp_path), max_model_len=64, kv_cache_gb=0.25)
    yield model, generator
    generator.close()


def test_tied_head_follows_when_only_the_embeddings_are_sent(small):
    """vLLM's packed head would keep the old weights: off by nats, and no error."""
    model, generator = small
    perturb(model, 1)
    pairs = list(model.named_parameters())
    assert "lm_head.weight" not in dict(pairs)
    make_sender("in_process").send(lambda: pairs, generator, 1)
    rows = canary_tokens(VOCAB, count=2, length=12)
    assert largest_difference(generator.logprobs(rows), hf_logprobs(model, rows)) < BOUND


def test_prompts_of_more_tokens_than_one_pass_takes(small):
    """vLLM would cut one in two, throw away what its first half draws, and fail to turn a CPU's generator back."""
    _, generator = small
    dice = random.Random(0)
    asked = [Request(i, i, tuple(dice.choices(range(2, VOCAB), k=40)), seed=i) for i in range(300)]
    whole = rows_of(generator.generate(asked, Sampling(max_new_tokens=3)))
    few = rows_of(generator.generate(asked[200:220], Sampling(max_new_tokens=3)))
    assert len(whole) == 300 and few == {i: whole[i] for i in few}


def test_missing_parameter_in_the_very_first_sync_is_found_by_the_worker(small):
    model, generator = small
    pairs = [(n, t) for n, t in plain_state(model) if "input_layernorm" not in n]
    with pytest.raises(SyncError, match=r"1 parameters were not sent.*input_layernorm"):
        make_sender("in_process").send(lambda: pairs, generator, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of the CPU kernels")
def test_head_size_without_a_kernel_is_refused_at_the_start(tmp_path):
    model = build_scratch("qwen2", vocab_size=VOCAB, hidden_size=32, layers=1, heads=2, max_length=64)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"heads have size 16.*32, 64, 80.*generator.engine=hf"):
        VLLMGenerator(str(tmp_path), max_model_len=64, kv_cache_gb=0.25)


def test_model_that_vllm_does_not_know(tmp_path):
    model = build_scratch("lstm", vocab_size=VOCAB, hidden_size=32, layers=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"vLLM cannot serve .*LstmForCausalLM.*generator.engine=hf"):
        VLLMGenerator(str(tmp_path), max_model_len=64, kv_cache_gb=0.25)


def test_settings_that_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="generator.tensor_parallel=2.*sync.transport=nccl"):
        VLLMGenerator(str(tmp_path), transport="in_process", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="generator.engine_args: dtype, seed is set by the run itself"):
        VLLMGenerator(str(tmp_path), engine_args={"seed": 1, "dtype": "float16", "max_num_seqs": 8})
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(generator_vllm, "_start", lambda settings, transport: made.append(settings))
        patch.setattr(generator_vllm, "_check_head_size", lambda llm, model: None)
        VLLMGenerator(str(tmp_path))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        VLLMGenerator(str(tmp_path))
    # vllm_limits.py names them before there is an engine.
    assert made[0].keys() | made[1].keys() | {"weight_transfer_config"} == OWN_ENGINE_ARGS | {"max_num_seqs"}
    monkeypatch.setattr(generator_vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install rlhf-ray\[vllm\].*generator.engine=hf"):
        VLLMGenerator(str(tmp_path))
