"""Whether vLLM will serve a model folder, told by its config.json before anything loads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from rlhf_ray.config.schema import GeneratorConfig
from rlhf_ray.config.vllm_limits import Shape, shape_problems
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import load_shape


def require_served(
    path: str, generator: GeneratorConfig, device: str, *, longest: int, bfloat16: bool, trust_remote_code: bool = False
) -> None:
    """Refuse what vLLM would refuse when it has started; nothing for other engines.

    Args:
        device: cuda or cpu; auto, where nobody has looked yet, is taken to be able to do anything.
        longest: tokens of the longest prompt and answer together, at most.
    Raises:
        ModelError: what does not fit, why, and what to set.
    """
    if not generator.facts.limits_shapes:
        return
    config = load_shape(path, trust_remote_code=trust_remote_code).get_text_config()
    shape = shape_of(config)
    if shape is None:
        return
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    instead = "choose another model, or set generator.engine=hf"
    problems = shape_problems(path, shape, generator, device, longest=longest, bfloat16=bfloat16, instead=instead)
    if problems:
        raise ModelError("\n".join(problems))


def shape_of(config: PreTrainedConfig) -> Shape | None:
    """What can be read off a decoder's config, as vLLM reads it; None for one without attention heads.

    Latent attention (DeepSeek) and layers that keep only a window or a state have cache sizes of their own: of those
    nothing is said.
    """

    def number(name: str) -> int | None:
        value: Any = getattr(config, name, None)
        return value if isinstance(value, int) and value > 0 else None

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    if heads is None or number("kv_lora_rank"):
        return None
    head_size = number("head_dim") or (hidden // heads if hidden else None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    whole = set(kinds) == {"full_attention"} and not (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
    return Shape(
        heads,
        head_size,
        number("num_key_value_heads") or heads,
        number("intermediate_size"),
        number("num_hidden_layers") if whole else None,
    )
