"""Models by name, for a plan without a folder: shapes as their makers' config.json give them."""

from __future__ import annotations

import difflib
import re

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from rlhf_ray.errors import ConfigError

# layers, hidden, heads, kv_heads, mlp, vocab, tied
_SHAPES: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, int, int, bool]] = {
    "qwen2-0.5b": (Qwen2Config, 24, 896, 14, 2, 4864, 151936, True),
    "qwen2-1.5b": (Qwen2Config, 28, 1536, 12, 2, 8960, 151936, True),
    "qwen2-3b": (Qwen2Config, 36, 2048, 16, 2, 11008, 151936, True),
    "qwen2-7b": (Qwen2Config, 28, 3584, 28, 4, 18944, 152064, False),
    "qwen2-14b": (Qwen2Config, 48, 5120, 40, 8, 13824, 152064, False),
    "qwen2-32b": (Qwen2Config, 64, 5120, 40, 8, 27648, 152064, False),
    "qwen2-72b": (Qwen2Config, 80, 8192, 64, 8, 29568, 152064, False),
    "llama-1b": (LlamaConfig, 16, 2048, 32, 8, 8192, 128256, True),
    "llama-3b": (LlamaConfig, 28, 3072, 24, 8, 8192, 128256, True),
    "llama-8b": (LlamaConfig, 32, 4096, 32, 8, 14336, 128256, False),
    "llama-70b": (LlamaConfig, 80, 8192, 64, 8, 28672, 128256, False),
    "llama2-7b": (LlamaConfig, 32, 4096, 32, 32, 11008, 32000, False),
}
LONGEST = 131_072  # positions; the models were made for as many, or can be stretched to them


def shape_named(name: str) -> PreTrainedConfig | None:
    """None for what is no name of a shape: then it is a folder or a Hub name."""
    key = _plain(name)
    if key not in _SHAPES:
        return None
    kind, layers, hidden, heads, kv_heads, mlp, vocab, tied = _SHAPES[key]
    return kind(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=LONGEST,
    )  # fmt: skip


def require_shape(name: str, why: str) -> PreTrainedConfig:
    """Raises ConfigError with the names that there are."""
    found = shape_named(name)
    if found is None:
        near = difflib.get_close_matches(_plain(name), _SHAPES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{why}{meant}; name a folder with a config.json, or one of {', '.join(_SHAPES)}")
    return found


def _plain(name: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct`, `meta-llama/Llama-3.1-8B`: the shape is the family's."""
    base = name.rpartition("/")[2].lower()
    base = re.sub(r"-(instruct|chat|base|it|hf|math|coder)\b", "", base).replace("meta-llama", "llama")
    return re.sub(r"^(qwen2)\.5\b|^(llama)-?3(\.[0-9])?\b", lambda found: found[1] or found[2], base)
