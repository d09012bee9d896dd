"""What a model computes while it writes: whole prompts, each distinct one once, and then one token a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

Tokens = tuple[int, ...]

AT_ONCE = 16_384  # tokens of prompts in one pass, padding included

_KNOWN = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)  # to PlainStep


@dataclass(frozen=True)
class Passed:
    """What a pass leaves: the logits of each row's next token, and the model's cache."""

    logits_BV: Tensor
    cache: Any


def distinct(prefixes: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """The different ones among them, in order, and which of those each is."""
    found = dict.fromkeys(prefixes)
    index = {prefix: place for place, prefix in enumerate(found)}
    return list(found), [index[prefix] for prefix in prefixes]


def left_padded(rows: Sequence[Tokens], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, T], every row's last token in the last column."""
    width = max(map(len, rows))
    tokens = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


class PromptPass:
    """Runs whole prompts, or what has been written behind them as well, through the model."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.inputs = set(inspect.signature(model.forward).parameters)

    def batches(self, rows: Sequence[Tokens], at_once: int = AT_ONCE) -> Iterator[tuple[list[int], Passed]]:
        """Some of the rows at a time, of so many tokens: their places, and what the model made of them."""
        waiting = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        while waiting:
            count = max(1, at_once // len(rows[waiting[0]]))
            members, waiting = sorted(waiting[:count]), waiting[count:]
            yield members, self.run([rows[member] for member in members])

    def run(self, rows: Sequence[Tokens]) -> Passed:
        tokens, mask = left_padded(rows, self.pad_token_id, self.model.device)
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
        if "attention_mask" in self.inputs and not mask.all():
            given["attention_mask"] = mask
        if "position_ids" in self.inputs:
            given["position_ids"] = positions(mask)
        if "logits_to_keep" in self.inputs:
            given["logits_to_keep"] = 1
        output = self.model(**given)
        return Passed(output.logits[:, -1], getattr(output, "past_key_values", None))


def positions(mask: Tensor) -> Tensor:
    """[B, T] of each token in its row, 0 in the padding before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class PlainStep:
    """`model(...)` for one new token a row, over layers of `KVMemory`, from the layers' own weights.

    The same numbers by fewer operations: a small model's step is mostly the cost of starting them. The modules start
    about 75 a layer, this starts 25, and attention reads the keys of a group of heads where they lie instead of
    repeating them for each head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.model
        self.head = model.lm_head
        self.layers = [_Layer(layer) for layer in self.model.layers]

    @staticmethod
    def knows(model: PreTrainedModel) -> bool:
        """Whether it is one of those classes, as Transformers made it: no adapters, no quantized layers."""
        return (
            type(model) in _KNOWN
            and model.config.hidden_act == "silu"
            and model.config._attn_implementation in ("sdpa", "eager")
            and all(type(part) is nn.Linear for part in model.modules() if isinstance(part, nn.Linear))
            and not any("lora" in name for name, _ in model.named_parameters())
        )

    def __call__(self, token_B: Tensor, position_B1: Tensor, memory: Sequence[Any], masks: Sequence[Any]) -> Tensor:
        """Logits of the next token [B, V]; `masks` [B, 1, 1, T] or None, one a layer."""
        x_BH = self.model.embed_tokens(token_B[:, None])[:, 0]
        cos_B1D, sin_B1D = self.model.rotary_emb(x_BH, position_B1)
        half = sin_B1D.shape[-1] // 2
        # The other half of a head, turned: with the sign in the sine it is a roll.
        sin_B1D = torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], -1)
        for layer, kept, mask in zip(self.layers, memory, masks, strict=True):
            x_BH = layer(x_BH, cos_B1D, sin_B1D, kept, mask)
        return self.head(_normed(x_BH, self.model.norm.weight, self.model.norm.variance_epsilon))


class _Layer:
    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            (part.weight, part.bias)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                         mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )  # fmt: skip
        self.before, self.between = (
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.q_norm, self.k_norm = (
            (norm.weight, norm.variance_epsilon) if norm is not None else None
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        )
        self.size, self.scaling, self.group = attention.head_dim, attention.scaling, attention.num_key_value_groups

    def __call__(self, x_BH: Tensor, cos_B1D: Tensor, sin_B1D: Tensor, kept: Any, mask: Tensor | None) -> Tensor:
        rows = len(x_BH)
        h_BH = _normed(x_BH, *self.before)
        q_BND = self._heads(F.linear(h_BH, *self.q), self.q_norm, cos_B1D, sin_B1D)
        k_BND = self._heads(F.linear(h_BH, *self.k), self.k_norm, cos_B1D, sin_B1D)
        v_BND = F.linear(h_BH, *self.v).view(rows, -1, self.size)
        keys, values = kept.update(k_BND[:, :, None], v_BND[:, :, None])
        mixed = F.scaled_dot_product_attention(
            q_BND.view(rows, -1, self.group, self.size), keys, values, attn_mask=mask, scale=self.scaling
        )
        x_BH = x_BH + F.linear(mixed.reshape(rows, -1), *self.o)
        h_BH = _normed(x_BH, *self.between)
        return x_BH + F.linear(F.silu(F.linear(h_BH, *self.gate)).mul_(F.linear(h_BH, *self.up)), *self.down)

    def _heads(self, x: Tensor, norm: Any, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
        x_BND = x.view(len(x), -1, self.size)
        if norm is not None:
            x_BND = _normed(x_BND, *norm)
        return x_BND * cos_B1D + x_BND.roll(self.size // 2, -1) * sin_B1D


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    # In half precision the modules round before they multiply.
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
