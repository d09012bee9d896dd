"""The same comparison with vLLM, two engines one after the other in one process, and with Hugging Face generate."""

import json
import sys

import pytest

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.evaluation.compare import compare
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]


def test_vllm_and_hugging_face_measure_the_same(tmp_path):
    tokenizer = build_tokenizer("char", [*map(chr, range(32, 127))])
    for seed, name in enumerate(("one", "two")):
        shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "layers": 1, "heads": 2, "max_length": 64}
        model = build_scratch("qwen2", **shape, tie_embeddings=False, seed=seed)
        model.get_output_embeddings().weight.data.mul_(8)  # an untrained model whose choices are no toss-ups
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"number {i}: " + "some words " * i}) + "\n" for i in range(1, 6)))

    def measured(engine):
        return compare(EvalRunConfig(
            device="cpu",
            models={name: str(tmp_path / name) for name in ("one", "two")},
            data={"path": "task:arithmetic", "limit": 20, "max_prompt_tokens": 8},
            sampling={"max_new_tokens": 24, "temperature": 0.0},
            rewards=[{"function": "repetition_penalty"}],
            perplexity={"path": str(texts), "window": 30},
            generator={"engine": engine, "kv_cache_gb": 0.25},
        ))  # fmt: skip

    with_hf, with_vllm = measured("hf"), measured("vllm")
    for name in ("one", "two"):
        assert with_vllm.answers[name].completions == with_hf.answers[name].completions
        ours, theirs = (r.result["models"][name]["metrics"] for r in (with_vllm, with_hf))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert with_vllm.answers["one"].completions != with_vllm.answers["two"].completions
