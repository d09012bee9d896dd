"""Whether a model fits what a command asks of it: the one place that says so, before anything heavy loads.

Told by the model's config.json and by a tokenizer. Beyond its last position or token a model has no embedding: an index
error in the middle of a run, or worse on a GPU. A model that is built on the spot is made to fit; what its settings
alone contradict, `config/checks.py` and `config/vllm_limits.py` know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from rlhf_ray.config.schema import GeneratorConfig
from rlhf_ray.config.vllm_limits import Shape, shape_problems
from rlhf_ray.data.token_rows import Bounds, joined_rows
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.models.loading import load_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Limits:
    """What a model can read.

    Attributes:
        path: what people call it.
        positions: tokens of a sequence; None: nothing bounds it.
        embeddings: it has one for each token below this; None: nothing is known.
        packed: its weights are quantised already.
    """

    path: str
    positions: int | None = None
    embeddings: int | None = None
    packed: bool = False

    @classmethod
    def of(cls, path: str | Path, shape: PreTrainedConfig) -> Limits:
        packed = getattr(shape, "quantization_config", None) is not None
        return cls(str(path), positions_of(shape), getattr(shape.get_text_config(), "vocab_size", None), packed)

    def longest(self, allowed: int) -> int:
        """Tokens of a sequence, where the settings allow so many."""
        return min(allowed, self.positions or allowed)


def limits_of(path: str | Path, *, trust_remote_code: bool = False) -> Limits:
    """Of a model folder or Hub name; of one that is built on the spot, none. Raises ModelError."""
    if str(path).startswith("scratch:"):
        return Limits(str(path))
    return Limits.of(path, load_shape(path, trust_remote_code=trust_remote_code))


def positions_of(shape: PreTrainedConfig) -> int | None:
    """Of a decoder; None: it has no table of them."""
    return getattr(shape.get_text_config(), "max_position_embeddings", None)


def require_end(tokenizer: PreTrainedTokenizerBase, path: str, what: str) -> None:
    """`what`: that would never end. Raises ModelError for a tokenizer without an end."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: the tokenizer has no EOS token, so no {what} could end; set eos_token in its "
            "tokenizer_config.json"
        )


def require_policy_fits(limits: Limits, tokenizer: PreTrainedTokenizerBase, prompts: Rows, new: int) -> None:
    """A policy that is to answer these prompts and to learn from it. Raises ConfigError, ModelError.

    `new`: rollout.max_new_tokens.
    """
    if limits.packed:
        raise ModelError(
            f"{limits.path} holds packed (quantised) weights, and the generators could not take the numbers that the "
            "learner sends; name the full-precision model, and to train it in 4 bits set model.lora.quantize=nf4"
        )
    require_room(limits, Bounds.of(prompts).longest, new, "rollout.max_new_tokens")
    require_tokens(limits, tokenizer, joined_rows([prompts, [[tokenizer.eos_token_id]]]))


def require_critic_fits(limits: Limits, tokenizer: PreTrainedTokenizerBase, longest_prompt: int, new: int) -> None:
    """It reads whatever the policy writes. Embeddings beyond the tokenizer's are padding, often of another size.

    Raises ConfigError, ModelError.
    """
    require_room(limits, longest_prompt, new, "rollout.max_new_tokens")
    written = len(tokenizer)
    if limits.embeddings is not None and limits.embeddings < written:
        raise ModelError(
            f"critic.path={limits.path} has {limits.embeddings} embeddings, and the policy writes {written} different "
            "tokens; name a model with the policy's tokenizer and at least its vocabulary, or leave critic.path empty"
        )


def require_room(limits: Limits, longest_prompt: int, new: int, setting: str) -> None:
    """For the longest prompt and its answer. `setting`: what says `new`. Raises ConfigError."""
    if limits.positions is not None and longest_prompt + new > limits.positions:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens, and with {setting}={new} that is more than the "
            f"{limits.positions} positions of {limits.path}; lower {setting}, or set data.max_prompt_tokens and "
            "data.overlong_prompts=drop"
        )


def room_behind(limits: Limits, prompt: Sequence[int], most: int, what: str = "the prompt") -> int:
    """Tokens that can be written behind one prompt, at most `most`; at least one, or a DataError."""
    if limits.positions is None:
        return most
    if len(prompt) >= limits.positions:
        raise DataError(
            f"{what} has {len(prompt)} tokens, and {limits.path} has {limits.positions} positions, so nothing can be "
            "written behind it; shorten it"
        )
    return min(most, limits.positions - len(prompt))


def require_rows_fit(limits: Limits, tokenizer: PreTrainedTokenizerBase, rows: Rows, section: str = "data") -> None:
    """Whole rows, to be learned. `section`: says where they come from. Raises ConfigError, ModelError."""
    longest = max(map(len, rows))
    if limits.positions is not None and longest > limits.positions:
        raise ConfigError(
            f"the longest row has {longest} tokens, and {limits.path} has {limits.positions} positions; set "
            f"{section}.max_length={limits.positions}, with {section}.overlong=truncate or drop"
        )
    require_tokens(limits, tokenizer, rows)


def require_tokens(
    limits: Limits, tokenizer: PreTrainedTokenizerBase, rows: Rows, setting: str = "model.tokenizer.path"
) -> None:
    """An embedding for each token. `setting`: says which tokenizer. Raises ModelError."""
    highest = Bounds.of(rows).highest
    if limits.embeddings is not None and highest >= limits.embeddings:
        raise ModelError(
            f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is beyond the {limits.embeddings} "
            f"embeddings of {limits.path}: the tokenizer is another model's, or got tokens that the model did not; "
            f"set {setting} to the right one, or resize the model's embeddings"
        )


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
    if not generator.facts.limits_shapes or path.startswith("scratch:"):
        return
    config = load_shape(path, trust_remote_code=trust_remote_code).get_text_config()
    shape = shape_of(config)
    if shape is None:
        return
    longest = min(longest, positions_of(config) or longest)
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
