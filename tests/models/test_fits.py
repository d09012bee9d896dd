"""Whether a model fits, told by its config.json: for vLLM, for prompts and rows, for a tokenizer."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen2Config, Qwen3Config

from rlhf_ray.config.schema import GeneratorConfig
from rlhf_ray.config.vllm_limits import Shape
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.models.fits import (
    Limits,
    limits_of,
    require_critic_fits,
    require_policy_fits,
    require_rows_fit,
    require_served,
    require_tokens,
    room_behind,
    shape_of,
)

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


# ---- what a model can read: positions and embeddings ------------------------------------------------------------


class Letters:
    """A tokenizer of three letters and an end, 3."""

    eos_token_id = 3

    def __len__(self) -> int:
        return 4

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


SMALL = Limits("small", positions=10, embeddings=4)
UNKNOWN = Limits("scratch:qwen2")


def test_limits_of_a_folder(tmp_path):
    GPT2Config(vocab_size=7, n_positions=12, n_embd=8, n_head=1).save_pretrained(tmp_path / "gpt2")
    assert limits_of(tmp_path / "gpt2") == Limits(str(tmp_path / "gpt2"), 12, 7)
    MambaConfig(vocab_size=7).save_pretrained(tmp_path / "mamba")
    assert limits_of(tmp_path / "mamba").positions is None, "a state has no end"
    packed = Qwen2Config(**SIZES, quantization_config={"quant_method": "awq", "bits": 4})
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match="packed holds packed .*model.lora.quantize=nf4"):
        require_policy_fits(limits_of(tmp_path / "packed"), Letters(), [[0]], 1)
    assert limits_of("scratch:qwen2") == UNKNOWN, "made to fit"


def test_the_last_position_is_the_answers():
    require_policy_fits(SMALL, Letters(), [[0], [0, 1, 2, 0, 1, 2]], 4)
    with pytest.raises(ConfigError, match=r"has 7 tokens, and with rollout.max_new_tokens=4 .* the 10 positions"):
        require_policy_fits(SMALL, Letters(), [[0], [0] * 7], 4)
    require_policy_fits(UNKNOWN, Letters(), [[9] * 1000], 1000)
    assert (SMALL.longest(9), SMALL.longest(11), UNKNOWN.longest(11)) == (9, 10, 11)


def test_room_behind_a_prompt():
    assert [room_behind(SMALL, [0] * length, 4) for length in (1, 6, 7, 9)] == [4, 4, 3, 1]
    assert room_behind(UNKNOWN, [0] * 99, 4) == 4
    with pytest.raises(DataError, match="row 3 has 10 tokens, and small has 10 positions, so nothing can be written"):
        room_behind(SMALL, [0] * 10, 4, "row 3")


def test_every_token_has_an_embedding():
    with pytest.raises(ModelError, match="token 4 .'<4>'. is beyond the 4 embeddings of small.*set model.tokenizer"):
        require_policy_fits(SMALL, Letters(), [[0, 4]], 1)
    with pytest.raises(ModelError, match="token 3 .* is beyond the 3 embeddings"):  # no answer could end
        require_policy_fits(Limits("small", embeddings=3), Letters(), [[0]], 1)
    with pytest.raises(ModelError, match="set the model's tokenizer to the right one"):
        require_tokens(SMALL, Letters(), [[4]], "the model's tokenizer")


def test_rows_that_are_learned():
    require_rows_fit(SMALL, Letters(), [[0] * 10, [3]])
    with pytest.raises(ConfigError, match="longest row has 11 tokens.* set sft_data.max_length=10, with sft_data"):
        require_rows_fit(SMALL, Letters(), [[0] * 11], "sft_data")


def test_a_critic_of_its_own_reads_what_the_policy_writes():
    require_critic_fits(SMALL, Letters(), 6, 4)
    with pytest.raises(ConfigError, match="more than the 10 positions of small"):
        require_critic_fits(SMALL, Letters(), 7, 4)
    with pytest.raises(ModelError, match="critic.path=small has 3 embeddings, and the policy writes 4 different"):
        require_critic_fits(Limits("small", 10, 3), Letters(), 6, 4)
