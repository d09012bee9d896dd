"""Small models built from a config, for machines without downloads: causal language models and classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.lstm import LstmConfig, LstmForCausalLM, LstmForSequenceClassification

ScratchKind = Literal["qwen2", "gpt2", "lstm"]
ClassifierKind = Literal["bert", "qwen2", "gpt2", "lstm"]
_CLASSES = {"qwen2": Qwen2ForCausalLM, "gpt2": GPT2LMHeadModel, "lstm": LstmForCausalLM}
_CLASSIFIERS = {
    "bert": BertForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "lstm": LstmForSequenceClassification,
}


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
    return _seeded(_CLASSES[kind], _config(kind, *shape, specials), seed)


def build_scratch_classifier(
    kind: ClassifierKind,
    *,
    labels: Sequence[str],
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
    """Like `build_scratch`, with a classifier's head; `bert` is an encoder that reads both ways."""
    if kind not in _CLASSIFIERS:
        raise ConfigError(f"model.kind={kind!r} is unknown; choose one of {', '.join(_CLASSIFIERS)}")
    specials = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "bos_token_id": None}
    shape = (vocab_size, hidden_size, layers, heads, intermediate_size, max_length, tie_embeddings)
    config = _config(kind, *shape, specials)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    return _seeded(_CLASSIFIERS[kind], config, seed)


def _seeded(factory: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    # fork_rng(devices=[]) and the CPU generator only: torch.manual_seed would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = factory(config)
    return model.float().eval()


def _check_heads(kind: str, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise ConfigError(
            f"model: hidden_size={hidden_size} does not divide into heads={heads}; choose a multiple of {heads}"
        )
    if kind == "qwen2" and hidden_size // heads % 2:
        raise ConfigError(
            f"model.kind=qwen2: hidden_size/heads={hidden_size // heads} is odd, and rotary positions turn pairs; "
            "choose an even head size"
        )


def _config(
    kind: str,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int | None,
    max_length: int,
    tie_embeddings: bool,
    specials: dict[str, int | None],
) -> PreTrainedConfig:
    common = {"vocab_size": vocab_size, **specials}
    if kind == "lstm":
        if intermediate_size is not None:
            raise ConfigError("model.kind=lstm has no feed-forward part; remove intermediate_size")
        return LstmConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            max_position_embeddings=max_length,
            tie_word_embeddings=tie_embeddings,
            **common,
        )
    _check_heads(kind, hidden_size, heads)
    if kind == "bert":
        return BertConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate_size or 4 * hidden_size,
            max_position_embeddings=max_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **common,
        )
    if kind == "gpt2":
        return GPT2Config(
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            n_inner=intermediate_size or 4 * hidden_size,
            n_positions=max_length,
            tie_word_embeddings=tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    return Qwen2Config(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        attention_dropout=0.0,
        **common,
    )
