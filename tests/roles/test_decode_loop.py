"""The engine behind the local generator: joins, leaves, weights between two steps, and a bound on its memory."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.errors import DataError
from rlhf_ray.roles.decode_forward import PlainStep
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.kv_memory import KVMemory
from rlhf_ray.roles.own_cache import OwnCache
from rlhf_ray.roles.protocols import Request, Sampling

KINDS = ["qwen2", "gpt2", "lstm"]
PROMPTS = [(2, 3, 4), (5,), (6, 7, 8, 9, 10), (2, 3), (9,), (4, 4, 4, 4)]
STOPS = Sampling(12, stop_token_ids=(1,))


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request(i // 2, i, PROMPTS[i // 2 % 6], seed=1000003 * i + 17) for i in range(first, first + count)]


@pytest.fixture
def generator(tiny):
    return lambda kind="qwen2", **settings: HFGenerator(tiny(kind), pad_token_id=0, **settings)


def collected(engine: HFGenerator) -> dict:
    """All that is open, by sample_id."""
    found = {}
    while engine.open:
        found |= {sample.sample_id: sample for sample in engine.collect()}
    return found


def answers(samples: dict) -> dict[int, list[int]]:
    return {key: sample.tokens[sample.spans[0][0] :].tolist() for key, sample in samples.items()}


def written(engine: HFGenerator, asked: list[Request], sampling: Sampling = STOPS) -> dict[int, list[int]]:
    engine.submit(asked, sampling)
    return answers(collected(engine))


def push(engine: HFGenerator, model: torch.nn.Module, version: int) -> None:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    engine.start_weight_update()
    engine.update_weights({"names": list(tensors), "tensors": list(tensors.values()), "index": 0, "last": True})
    engine.finish_weight_update(str(version))


# ---- rows come and go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_late_joiners_change_nothing(generator, kind):
    together = written(generator(kind), requests(12))
    assert len({len(answer) for answer in together.values()}) > 3, "rows leave at different times"
    engine = generator(kind)
    engine.submit(requests(5), STOPS)
    assert engine.open == 5
    found = {sample.sample_id: sample for sample in engine.collect()}
    assert 0 < len(found) < 5 and engine.open == 5 - len(found)
    engine.submit(requests(7, first=5), STOPS)
    assert answers(found | collected(engine)) == together


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_requests_are_gone_and_the_others_unchanged(generator, kind):
    alone = written(generator(kind), requests(12))
    engine = generator(kind, batch_size=8)
    engine.submit(requests(12), Sampling(12, stop_token_ids=(1,)))
    found = {sample.sample_id: sample for sample in engine.collect()}
    gone = {0, 3, 7, 10, 11} - found.keys()  # running ones, and two that wait
    engine.cancel([*gone, 99])
    assert engine.open == 12 - len(found) - len(gone)
    found |= collected(engine)
    assert answers(found) == {key: answer for key, answer in alone.items() if key not in gone}
    engine.submit(requests(2), STOPS)
    engine.cancel([0, 1])
    assert engine.open == 0 and engine.collect() == []


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_length_join_at_any_time(generator, kind):
    """The rows' columns move back, forth and into larger memory; each answer is the one its request gets alone."""
    dice = random.Random(4)
    asked = [
        Request(i, i, tuple(dice.randint(2, 10) for _ in range(dice.choice([1, 2, 3, 14]))), seed=i, temperature=heat)
        for i, heat in enumerate(dice.choices([None, 0.0, 0.7], k=24))
    ]
    samplings = [Sampling(dice.randint(1, 9), top_k=dice.choice([0, 3]), top_p=dice.choice([1.0, 0.8])) for _ in asked]
    alone = generator(kind)
    expected = {}
    for request, sampling in zip(asked, samplings, strict=True):
        expected |= written(alone, [request], sampling)
    engine, found = generator(kind, batch_size=5), {}
    for request, sampling in zip(asked, samplings, strict=True):
        engine.submit([request], sampling)
        if dice.random() < 0.4:
            found |= {sample.sample_id: sample for sample in engine.collect()}
    assert answers(found | collected(engine)) == expected


def test_an_engine_that_was_interrupted_goes_on(generator):
    """Whatever a step left behind half done: the rows are computed anew from their tokens."""
    together = written(generator(), requests(6))
    engine, calls = generator(), []

    def hook(*_):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    engine.model.get_input_embeddings().register_forward_hook(hook)
    engine.submit(requests(6), STOPS)
    with pytest.raises(KeyboardInterrupt):
        collected(engine)
    assert engine.open and answers(collected(engine)).items() <= together.items()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests(6), STOPS)
    assert engine.open == 0, "nobody would collect the rest"


def test_requests_that_cannot_be_told_apart_or_served(generator):
    engine = generator()
    with pytest.raises(DataError, match="the prompt of request 7 is empty"):
        engine.submit([Request(0, 7, (), seed=1)], STOPS)
    engine.submit(requests(2), STOPS)
    with pytest.raises(ValueError, match="sample_id 1 is open"):
        engine.submit(requests(2, first=1), STOPS)
    assert engine.open == 2


# ---- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_log_probability_is_that_of_the_version_that_drew_it(generator, tiny, kind):
    engine, models = generator(kind), {0: tiny(kind), 4: tiny(kind, seed=5), 9: tiny(kind, seed=6)}
    engine.submit(requests(12), STOPS)
    found = {sample.sample_id: sample for sample in engine.collect()}
    push(engine, models[4], 4)
    found |= {sample.sample_id: sample for sample in engine.collect()}
    engine.submit(requests(2, first=12), STOPS)
    push(engine, models[9], 9)
    found |= collected(engine)
    assert {tuple(sorted(set(s.versions.tolist()))) for s in found.values()} >= {(0,), (0, 4), (0, 4, 9), (9,)}
    for sample in found.values():
        tokens = torch.from_numpy(sample.tokens).long()[None]
        start = sample.spans[0][0]
        for version, model in models.items():
            expected = token_logprobs(model(input_ids=tokens).logits, tokens)[0, start:].detach().numpy()
            mine = sample.versions == version
            assert abs(sample.logprobs - expected)[mine].max(initial=0) < 1e-5
    newest = HFGenerator(models[9], pad_token_id=0)
    assert answers({key: found[key] for key in (12, 13)}) == written(newest, requests(2, first=12))


def test_sleep_gives_the_memory_back_and_open_requests_go_on(generator):
    together = written(generator(), requests(8))
    engine = generator()
    engine.submit(requests(8), STOPS)
    found = {sample.sample_id: sample for sample in engine.collect()}
    engine.sleep()
    assert stored(engine) == 0
    engine.wake()
    assert answers(found | collected(engine)) == together


# ---- memory ---------------------------------------------------------------------------------------------------


def stored(engine: HFGenerator) -> int:
    memory = engine._loop._memory
    return sum(store.nbytes for store in getattr(memory, "_stores", {}).values())


@pytest.mark.parametrize("kind", KINDS)
def test_five_times_the_rows_that_fit(generator, kind):
    asked = requests(20)
    together = written(generator(kind), asked)
    # Prompt and answer have 17 tokens at most: 4 rows of 21 columns; an LSTM has a state whatever the length.
    memory = generator(kind)._loop.memory
    row = 21 * memory.token_bytes if kind != "lstm" else memory.row_bytes
    engine = generator(kind, kv_cache_gb=(4.5 * row) / 2**30)
    rows, taken = [], []

    def seen(_, args, __) -> None:
        rows.append(args[0].shape)
        taken.append(stored(engine))

    engine.model.get_input_embeddings().register_forward_hook(seen)
    assert written(engine, asked) == together
    assert max(count for count, width in rows if width == 1) in (4, 5), "five of the shorter ones"
    assert max(taken) <= 4.5 * row and len(rows) < 20 * 6, "and not one row after the other"


def test_what_a_token_takes_is_what_the_layers_keep(generator, tiny):
    config = tiny().config
    size = config.hidden_size // config.num_attention_heads
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4
    assert generator()._loop.memory.token_bytes == expected


def test_one_sequence_that_does_not_fit(generator):
    engine = generator(kv_cache_gb=1e-6)
    with pytest.raises(DataError, match=r"may have 300 tokens, and generator.kv_cache_gb=9.99\S* does not hold"):
        engine.submit([Request(0, 0, (3,) * 100, seed=1)], Sampling(200))


# ---- architectures --------------------------------------------------------------------------------------------

_SHAPE = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
_OLD = {"vocab_size": 11, "hidden_size": 16, "n_layer": 2, "n_head": 2}
_FALCON = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = {
    "llama": (KVMemory, {}),
    "qwen2": (KVMemory, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (KVMemory, {}),
    "mistral": (KVMemory, {"sliding_window": 4}),  # every layer slides
    "gemma2": (KVMemory, {"sliding_window": 4}),  # every other one does
    "gpt_oss": (KVMemory, {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks, experts
    "falcon": (KVMemory, _FALCON),
    "falcon with ALiBi": (OwnCache, {**_FALCON, "alibi": True}),
    "bloom": (OwnCache, _OLD),  # no positions but those of the mask
    "llama4_text": (OwnCache, {"num_local_experts": 2, "attention_chunk_size": 4, "intermediate_size_mlp": 16,
                               "layer_types": ["chunked_attention", "full_attention"]}),
    "openai-gpt": (OwnCache, {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),  # none
    "recurrent_gemma": (OwnCache, {"lru_width": 16, "attention_window_size": 4}),  # states inside the modules
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_answers_as_its_own_forward_pass_says(name):
    kind, settings = ARCHITECTURES[name]
    shape = {} if "vocab_size" in settings else _SHAPE
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **{**shape, **settings}))
    engine = HFGenerator(model, pad_token_id=0, batch_size=7)
    asked = requests(12)
    batch = engine.generate(asked, Sampling(9, stop_token_ids=(1, 7)))
    assert type(engine._loop.memory) is kind
    if kind is KVMemory:
        assert (engine._loop.memory._plain is not None) is (name in ("llama", "mistral", "qwen2", "qwen3"))
    for row, length in enumerate(batch.lengths.tolist()):
        tokens, mask = batch.tokens[row : row + 1, :length], batch.response_mask[row, :length]
        expected = token_logprobs(model(input_ids=tokens, use_cache=False).logits, tokens)[0].detach()
        assert (batch.logp_gen[row, :length] - expected)[mask].abs().max() < 1e-5
    assert len({tuple(row.tolist()) for row in batch.tokens}) > 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_token_from_the_weights_is_the_one_from_the_modules(name, dtype):
    shape = {**_SHAPE, "num_attention_heads": 4, "head_dim": 4, "sliding_window": 6, "attention_bias": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape), dtype=dtype)
    direct, modules = (HFGenerator(model, pad_token_id=0) for _ in range(2))
    modules._loop.memory._plain = None
    batch, expected = (engine.generate(requests(12), Sampling(9)) for engine in (direct, modules))
    assert direct._loop.memory._plain is not None
    assert torch.equal(batch.tokens, expected.tokens)
    assert (batch.logp_gen - expected.logp_gen).abs().max() < (5e-7 if dtype == torch.float32 else 1e-2)


def test_layers_that_are_not_as_transformers_made_them_are_called(generator, tiny):
    model = tiny()
    model.model.layers[0].mlp.up_proj = type("Quantized", (torch.nn.Linear,), {})(16, 64)
    assert not PlainStep.knows(model) and PlainStep.knows(tiny())
