"""Small causal language models built from a config, for machines without downloads."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.lstm import LstmConfig, LstmForCausalLM

ScratchKind = Literal["qwen2", "gpt2", "lstm"]
_CLASSES = {"qwen2": Qwen2ForCausalLM, "gpt2": GPT2LMHeadModel, "lstm": LstmForCausalLM}


def build_scratch(
    kind: ScratchKind,
    *,
    vocab_size: int,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    intermediate_size: int | None = None,
    max_length: int = 512,
    tie_embeddings: bool = True,
    seed: int = 0,
    eos_token_id: int = 1,
    pad_token_id: int = 0,
) -> PreTrainedModel:
    """A float32 model on the CPU with random weights that depend on `seed` and the shape alone.

    The global random state is left as it was. Dropout is 0 everywhere: PPO's importance ratio would differ from 1
    on the first step otherwise. `heads` does not apply to the LSTM. Raises ConfigError for an impossible shape.
    """
    if kind not in _CLASSES:
        raise ConfigError(f"model.kind={kind!r} is unknown; choose one of {', '.join(_CLASSES)}")
    specials = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "bos_token_id": None}
    shape = (vocab_size, hidden_size, layers, heads, intermediate_size, max_length, tie_embeddings)
    config = _config(kind, *shape, specials)
    # fork_rng(devices=[]) and the CPU generator only: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _CLASSES[kind](config)
    return model.float().eval()


def _config(
    kind: ScratchKind,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int | None,
    max_length: int,
    tie_embeddings: bool,
    specials: dict[str, int | None],
) -> PreTrainedConfig:
    if kind == "lstm":
        if intermediate_size is not None:
            raise ConfigError("model.kind=lstm has no feed-forward part; remove intermediate_size")
        return LstmConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            max_position_embeddings=max_length,
            tie_word_embeddings=tie_embeddings,
            **specials,
        )
    if hidden_size % heads:
        raise ConfigError(
            f"model: hidden_size={hidden_size} does not divide into heads={heads}; choose a multiple of {heads}"
        )
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            n_inner=intermediate_size or 4 * hidden_size,
            n_positions=max_length,
            tie_word_embeddings=tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **specials,
        )
    if hidden_size // heads % 2:
        raise ConfigError(
            f"model.kind=qwen2: hidden_size/heads={hidden_size // heads} is odd, and rotary positions turn pairs; "
            "choose an even head size"
        )
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        attention_dropout=0.0,
        **specials,
    )
