"""The numbers of a decoder's shape that memory and time follow from: read off its config.json, or a named shape.

No weights are read and nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from rlhf_ray.config.redacted import legible
from rlhf_ray.errors import ModelError
from rlhf_ray.models.fits import shape_of

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Architecture:
    """A dense transformer decoder.

    Attributes:
        mlp: width of the MLP.
        gated: Llama's family: a gated MLP and RMS norms; else GPT-2's, a plain MLP and layer norms.
        normed_heads: queries and keys are normalised (Qwen3).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int
    gated: bool = True
    normed_heads: bool = False

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.kv_heads * self.head_size

    @classmethod
    def of(cls, config: PreTrainedConfig, path: str) -> Architecture:
        """Raises ModelError for what is no dense decoder with full attention."""
        config = config.get_text_config()
        shape = shape_of(config)
        experts = next((name for name in _EXPERTS if (getattr(config, name, None) or 0) > 1), None)
        if experts is not None or shape is None or shape.head_size is None or not shape.layers:
            why = f"it has {getattr(config, experts)} experts a layer" if experts else "it is none"
            raise ModelError(
                f"{legible(path)} ({config.model_type}): a plan's formulas are those of a dense decoder in which every "
                f"layer attends to all tokens, and {why}; plan with a dense model of its size, such as "
                "--model qwen2-7b"
            )
        hidden, gated = int(config.hidden_size), shape.mlp is not None and not _plain(config)
        return cls(
            shape.layers, hidden, shape.heads, shape.kv_heads or shape.heads, shape.head_size,
            shape.mlp or getattr(config, "n_inner", None) or 4 * hidden, int(config.vocab_size), gated,
            config.model_type.startswith("qwen3"),
        )  # fmt: skip


def _plain(config: Any) -> bool:
    """Whether the MLP is two layers with a function between them."""
    return config.model_type in ("gpt2", "opt", "gpt_neox", "gpt_neo", "gptj", "falcon", "bloom", "phi", "starcoder2")
