"""A real learner and a real vLLM, through real updates: what the learner computes is what vLLM samples with.

One engine for all, of a model whose output head is its own (untied): the head's weights travel by themselves.
"""

from __future__ import annotations

import sys

import pytest
import torch

from rlhf_ray.errors import ModelError
from rlhf_ray.models.engine import build_engine
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles.generator_vllm import VLLMGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from tests.steps import one_step

pytestmark = [pytest.mark.engine, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]

VOCAB, BOUND = 23, 1e-4
FIXED = [[2, 3, 4, 5, 6, 7, 8], [9, 9, 9], [10, 11]]
REQUESTS = [Request(i // 4, i, (2 + i // 4, 5, 7)[: 1 + i // 4], seed=i) for i in range(12)]


def untied() -> torch.nn.Module:
    return build_scratch(
        "qwen2", vocab_size=VOCAB, hidden_size=64, layers=2, heads=2, max_length=32, tie_embeddings=False, seed=3
    )


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    untied().save_pretrained(folder)
    generator = VLLMGenerator(str(folder), transport="in_process", max_model_len=32, kv_cache_gb=0.25)
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def engine_of():
    """An engine by kind; DeepSpeed's has LoRA adapters around the model."""
    opened = []

    def make(kind: str):
        if kind == "torch":
            return build_engine("torch", untied())
        # One rank: it joins the process group that vLLM has made in this process.
        engine = build_engine("deepspeed", apply_lora(untied(), r=4, alpha=32.0), zero_stage=2, rank=0, world_size=1)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()


def largest_difference(one, other) -> float:
    return max(abs(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_log_probabilities_are_the_learners_after_each_of_three_syncs(generator, engine_of, learner_of, kind):
    engine = engine_of(kind)
    learner = learner_of(engine.module, engine=engine, lr=3e-2)
    learner.connect(generator)
    learner.push_weights(generator.version + 1)
    for step in range(3):
        batch = generator.generate(REQUESTS, Sampling(max_new_tokens=8, temperature=1.0))
        logp_BT = learner.logprobs(batch)
        assert (batch.logp_gen - logp_BT).abs().max() < BOUND, "what it says it sampled with"
        old = generator.logprobs(FIXED)
        sign_B = torch.where(batch.sample_id % 2 == 0, 1.0, -1.0)
        metrics = one_step(learner, batch.replace(advantages=sign_B[:, None] * batch.response_mask), step, 0.0)
        assert metrics["grad_norm"] > 0 and metrics["mismatch/absdiff_max"] < BOUND
        learner.push_weights(generator.version + 1)
        new = learner.canary_logprobs(FIXED)
        assert largest_difference(old, new) > 0.05, "the weights did change"
        assert largest_difference(generator.logprobs(FIXED), new) < BOUND


def test_a_diverged_model_is_not_exported_by_deepspeed_either(generator, engine_of, tmp_path):
    """Every rank hears of it: one that raised alone would leave the others waiting."""
    engine = engine_of("deepspeed")
    with torch.no_grad():
        next(p for p in engine.module.parameters() if not p.requires_grad).fill_(torch.nan)
    with pytest.raises(ModelError, match=r"weights are not finite \(the first is \S*model.embed_tokens.weight\)"):
        engine.save_pretrained(tmp_path / "model", None)
    assert not (tmp_path / "model").exists()
