"""Prompts through the model: each distinct one once, rows of like length side by side."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Tokens = tuple[int, ...]

AT_ONCE = 16_384  # tokens of prompts in one pass, padding included


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
