"""Real vLLM on CPU. Three engines, started one after the other, for most tests here."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.vllm_limits import OWN_ENGINE_ARGS
from rlhf_ray.errors import ConfigError, DataError, EngineError, ModelError, RequestError, RlhfRayError, SyncError
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.pretrained import plain_state
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles import vllm_engine
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.generator_vllm import VLLMGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sample import Sample
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
    assert batch.rows.weight_version.tolist() == [*[case.version] * 3, -1, *[case.version] * 8]
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


# ---- the engine as a service


def collect(generator: VLLMGenerator, until: int | None = None) -> dict[int, Sample]:
    """All that ends before the sample `until` has, and that one; None: all that is open."""
    found: dict[int, Sample] = {}
    while generator.open and until not in found:
        found |= {sample.sample_id: sample for sample in generator.collect()}
    return found


def swapped_twice(case: Case, models, *, late: bool) -> dict[int, Sample]:
    """Eight answers of 24 tokens; after 6 of them, and after 5 more, the next of three models. `late`: others join."""
    case.sync(models[0])
    case.generator.submit(requests(8), Sampling(24))
    found = {}
    for turn, tokens in enumerate((6, 5)):
        clock = Request(90 + turn, 90 + turn, (5, 6), seed=1)
        case.generator.submit([clock], Sampling(tokens))
        found |= collect(case.generator, clock.sample_id)
        case.sync(models[1 + turn])
        if late:
            joining = [replace(r, sample_id=r.sample_id + 10 * (1 + turn)) for r in requests(8)]
            case.generator.submit(joining, Sampling(9, temperature=1.5))
    return found | collect(case.generator)


def same(one: Sample, other: Sample) -> bool:
    return one.tokens.tolist() == other.tokens.tolist() and one.spans == other.spans and one.ended == other.ended


def test_weights_change_between_steps_while_requests_run(case):
    models = [copy.deepcopy(case.model) for _ in range(3)]
    for seed, model in enumerate(models[1:]):
        perturb(model, seed)
    found = swapped_twice(case, models, late=True)
    last = case.version
    writers = {last - 2: models[0], last - 1: models[1], last: models[2]}
    for sample in found.values():
        start, row = sample.spans[0][0], sample.tokens.tolist()
        temperature = 1.5 if 10 <= sample.sample_id < 30 else 1.0
        expected = {version: hf_logprobs(model, [row], temperature)[0] for version, model in writers.items()}
        for place, (version, logprob) in enumerate(zip(sample.versions, sample.logprobs, strict=True), start):
            assert abs(logprob - expected[version][place]) < BOUND, (sample.sample_id, place)
    long = [found[sample_id] for sample_id in range(8)]
    for sample in long:
        assert sample.versions.tolist() == [last - 2] * 6 + [last - 1] * 5 + [last] * 13 and sample.ended == "length"
    assert found[10].versions.tolist() == [last - 1] * 5 + [last] * 4 and set(found[20].versions) == {last}
    # It repeats, and who joins late changes nothing for the others.
    again, alone = swapped_twice(case, models, late=True), swapped_twice(case, models, late=False)
    assert again.keys() == found.keys() and all(same(again[i], found[i]) for i in found)
    assert all(again[i].logprobs.tolist() == found[i].logprobs.tolist() for i in found)
    assert all(same(alone[i], found[i]) for i in range(8)) and len(alone) == 10
    # One set of weights throughout writes something else.
    case.sync(models[0])
    case.generator.submit(requests(8), Sampling(24))
    unswapped = collect(case.generator)
    assert not any(same(unswapped[i], found[i]) for i in range(8))
    assert all(unswapped[i].tokens[: found[i].spans[0][0] + 6].tolist()
               == found[i].tokens[: found[i].spans[0][0] + 6].tolist() for i in range(8))  # fmt: skip


def test_a_cancelled_request_leaves_nothing_behind(case):
    generator, engine = case.generator, case.generator._llm.llm_engine
    case.sync(case.model)
    core = engine.engine_core.engine_core
    free = core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    everything, before = requests(12), free()
    generator.submit(everything, Sampling(20))
    undisturbed = collect(generator)
    generator.submit(everything, Sampling(20))
    generator.submit([Request(90, 90, (5, 6), seed=1), Request(91, 91, (5, 6), seed=2)], Sampling(4))
    first = generator.collect()
    assert generator.open == 12 and {sample.sample_id for sample in first} == {90, 91}
    assert free() < before
    generator.cancel([0, 5, 11, 777])
    assert generator.open == 9
    left = collect(generator)
    assert left.keys() == set(range(12)) - {0, 5, 11} and all(same(left[i], undisturbed[i]) for i in left)
    generator.submit([everything[5]], Sampling(20))  # from its first token
    assert same(collect(generator)[5], undisturbed[5])
    generator.submit(everything[:2], Sampling(20))
    generator.cancel([0, 1])
    assert generator.open == 0 and generator.collect() == []
    assert generator.logprobs([[2, 3]]), "a step later nothing is left in the engine"
    assert free() == before and not core.scheduler.requests
    assert not engine.output_processor.request_states and not any(engine.output_processor.external_req_ids.values())


def test_log_probabilities_while_requests_run(case):
    """The canary is asked between two steps; what ends meanwhile is not lost."""
    case.sync(case.model)
    rows = canary_tokens(VOCAB, count=3, length=20)
    quiet = case.generator.logprobs(rows)
    sampling = Sampling(2)
    case.generator.submit(requests(6), sampling)
    expected = collect(case.generator)
    case.generator.submit(requests(6), sampling)
    for _ in range(3):
        assert largest_difference(case.generator.logprobs(rows), quiet) < BOUND
    assert case.generator.open == 6
    case.generator.cancel([4])
    (found,) = [case.generator.collect()]
    assert [sample.sample_id for sample in found] == [0, 1, 2, 3, 5] and case.generator.open == 0
    assert all(same(sample, expected[sample.sample_id]) for sample in found)


def test_what_is_refused_while_requests_are_open(case):
    generator = case.generator
    generator.submit(requests(4), Sampling(5))
    with pytest.raises(RlhfRayError, match="cannot sleep with 4 open requests; collect or cancel them"):
        generator.sleep()
    with pytest.raises(RlhfRayError, match="4 requests are open; collect or cancel them first"):
        generator.generate(requests(1), Sampling(5))
    with pytest.raises(RlhfRayError, match="same sample_id"):
        generator.submit([requests(9)[8], requests(4)[3]], Sampling(5))
    with pytest.raises(RlhfRayError, match="same sample_id"):
        generator.submit([requests(9)[8]] * 2, Sampling(5))
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generator.submit([requests(9)[8], Request(0, 9, (), seed=1)], Sampling(5))
    with pytest.raises(Exception, match="top_p must be in"):  # vLLM's own
        generator.submit([requests(9)[8]], Sampling(5, top_p=7.0))
    assert generator.open == 4, "of a refused call nothing stays"
    generator.cancel(range(4))
    generator.submit([], Sampling(5))
    assert generator.open == 0


def test_a_request_that_fails_is_told_and_the_others_go_on(case, monkeypatch):
    generator, engine = case.generator, case.generator._llm.llm_engine
    case.sync(case.model)
    step, sampling = engine.step, Sampling(6)
    expected = rows_of(generator.generate(requests(4), sampling))

    def failing():
        outputs = step()
        for output in outputs:
            if output.request_id == "2":
                output.outputs[0].finish_reason = "error"
        return outputs

    monkeypatch.setattr(engine, "step", failing)
    generator.submit(requests(4), sampling)
    with pytest.raises(RequestError, match=r"1 requests failed.*sample 2 .*finish_reason=error; submit them") as one:
        generator.collect()
    assert one.value.sample_ids == (2,) and generator.open == 3
    assert {i: sample.tokens.tolist() for i, sample in collect(generator).items()} == {
        i: tokens for i, tokens in expected.items() if i != 2
    }
    with pytest.raises(RequestError, match="sample 2"):
        generator.generate(requests(4), sampling)
    assert generator.open == 0, "whoever asked for all has got none, and blocks nobody"
    monkeypatch.undo()
    assert rows_of(generator.generate(requests(4), sampling)) == expected


def test_sleep_does_nothing_on_cpu(case):
    case.generator.sleep()
    assert case.generator.logprobs([[2, 3]])
    case.generator.wake()


def test_an_update_whose_sender_was_lost_is_begun_again(case):
    """vLLM has taken half of it: some layers are whole, one has some of its tensors, others none."""
    count = len(list(plain_state(case.model)))
    for place in (1, count // 2, count - 1):
        perturb(case.model, place)

        def cut(place=place):
            for index, (name, tensor) in enumerate(plain_state(case.model)):
                if index == place:
                    raise RuntimeError("learner died")
                yield name, torch.full_like(tensor, 7.0)

        with pytest.raises(SyncError, match="learner died"):
            case.sender.send(cut, case.generator, 99)
        case.sync(case.model)
        assert case.generator.version == case.version
        rows = [[2, 5, 3, 8], [4, 4]]
        assert largest_difference(case.generator.logprobs(rows), hf_logprobs(case.model, rows)) < 1e-4


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

    case.generator.submit(requests(3), Sampling(max_new_tokens=2))
    with pytest.raises(SyncError, match="learner died|other tensors than in the update before"):
        case.sender.send(cut if case.model.config.model_type == "qwen2" else hole, case.generator, 99)
    assert case.generator.version != 99
    with pytest.raises(SyncError, match="cannot generate.*replace this generator"):
        case.generator.collect()
    case.generator.cancel([0, 1, 2])
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


def test_five_times_what_the_cache_holds_and_then_the_engine_dies(tmp_path, monkeypatch):
    model = build_scratch("qwen2", vocab_size=VOCAB, hidden_size=32, layers=1, heads=1, max_length=256)
    model.save_pretrained(tmp_path)
    # 256 bytes of keys and values a token: 12 of the 60 rows. They grow while they are written: some must wait again.
    generator = VLLMGenerator(str(tmp_path), max_model_len=256, kv_cache_gb=12 * 256 * 256 / 2**30)
    generator.submit(requests(60), Sampling(200))
    found = collect(generator)
    for sample_id in (0, 30, 59):
        generator.submit([requests(60)[sample_id]], Sampling(200))
        assert same(collect(generator)[sample_id], found[sample_id])

    def break_down(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(generator._llm.llm_engine.model_executor, "execute_model", break_down)
    generator.submit(requests(3), Sampling(5))
    with pytest.raises(EngineError, match="cannot go on: its engine died of RuntimeError: CUDA.*and 3 open requests"):
        generator.collect()
    submit = partial(generator.submit, requests(1), Sampling(5))
    for ask in (generator.collect, submit, partial(generator.logprobs, [[2]])):
        with pytest.raises(EngineError, match="its engine died of RuntimeError: CUDA error.*replace this generator"):
            ask()
    generator.cancel([0, 1, 2])
    assert generator.open == 0
    generator.close()
    with pytest.raises(EngineError, match="its engine was closed; replace this generator|died of"):
        generator.generate(requests(1), Sampling(5))


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
        patch.setattr(vllm_engine, "start", lambda settings, transport: made.append(settings))
        patch.setattr(vllm_engine, "label_weights", lambda llm, version: None)
        VLLMGenerator(str(tmp_path))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        VLLMGenerator(str(tmp_path))
        VLLMGenerator(str(tmp_path), engine_args={"async_scheduling": True})
    # vllm_limits.py names them before there is an engine.
    own = made[0].keys() | made[1].keys() | {"weight_transfer_config"}
    assert own == OWN_ENGINE_ARGS | vllm_engine.MAY_BE_CHOSEN
    assert [settings["async_scheduling"] for settings in made] == [False, False, True]
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install rlhf-ray\[vllm\].*generator.engine=hf"):
        VLLMGenerator(str(tmp_path))
