"""Which model folders vLLM will serve, told by their config.json."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen2Config, Qwen3Config

from rlhf_ray.config.schema import GeneratorConfig
from rlhf_ray.config.vllm_limits import Shape
from rlhf_ray.errors import ModelError
from rlhf_ray.models.served import require_served, shape_of

VLLM = GeneratorConfig(engine="vllm")


SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
         "num_hidden_layers": 4}  # fmt: skip
HALF_SLIDES = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


@pytest.mark.parametrize(("config", "shape"), [
    (Qwen2Config(**SIZES), Shape(4, 16, 2, 96, 4)),
    (Qwen2Config(**SIZES, **HALF_SLIDES), Shape(4, 16, 2, 96, None)),  # half of the layers keep 8 tokens
    (Qwen3Config(**SIZES, head_dim=48), Shape(4, 48, 2, 96, 4)),  # its own head size
    (LlamaConfig(**{**SIZES, "num_key_value_heads": None}), Shape(4, 16, 4, 96, 4)),
    (GPT2Config(n_embd=64, n_head=2, n_layer=3), Shape(2, 32, 2, None, 3)),
    (MambaConfig(), None),
])  # fmt: skip
def test_shape_of_a_config(config, shape):
    assert shape_of(config) == shape


def test_a_folder_is_refused_before_anything_loads(tmp_path):
    """It holds a config.json and no weights at all."""
    Qwen2Config(hidden_size=48, num_attention_heads=3, num_key_value_heads=3).save_pretrained(tmp_path)
    sizes = {"longest": 64, "bfloat16": False}
    with pytest.raises(ModelError, match=r"vLLM on CPU cannot serve .*have size 16.*choose another model, or set"):
        require_served(str(tmp_path), VLLM, "cpu", **sizes)
    require_served(str(tmp_path), VLLM, "cuda", **sizes)
    require_served(str(tmp_path), VLLM, "auto", **sizes)
    require_served(str(tmp_path), GeneratorConfig(engine="hf"), "cpu", **sizes)
    with pytest.raises(ModelError, match="generator.tensor_parallel=2 does not divide the 3 attention heads"):
        require_served(str(tmp_path), VLLM.model_copy(update={"tensor_parallel": 2}), "auto", **sizes)


def test_a_sequence_is_no_longer_than_the_positions(tmp_path):
    """2 layers x 8 heads of 128 in float32: 16 KiB a token, so 1 GiB holds 65,536 tokens."""
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2, "num_key_value_heads": 8}
    LlamaConfig(**shape, max_position_embeddings=1000).save_pretrained(tmp_path / "short")
    LlamaConfig(**shape, max_position_embeddings=10**6).save_pretrained(tmp_path / "long")
    require_served(str(tmp_path / "short"), VLLM, "cpu", longest=10**5, bfloat16=False)
    with pytest.raises(ModelError, match="generator.kv_cache_gb=1 does not hold one sequence: 100000 tokens"):
        require_served(str(tmp_path / "long"), VLLM, "cpu", longest=10**5, bfloat16=False)
