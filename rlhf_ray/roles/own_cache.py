"""The rows of a model that keeps more than keys and values, or something else: a batch at a time, in its own cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_ray.models.lstm import LstmState
from rlhf_ray.roles.decode_forward import PromptPass, distinct, left_padded, positions

_NAMES = ("past_key_values", "cache_params")
_SELECT_AT = 0.8  # share of rows that still go on at which the others are dropped from the cache


class OwnCache:
    """Recurrent and hybrid models, and those whose positions are columns: the model itself says what a step needs.

    Rows enter when no other is there, for a state cannot be put beside others' in every such cache.
    """

    joins_running = False

    def __init__(self, model: PreTrainedModel, prompts: PromptPass, probe: Any, budget: int | None) -> None:
        self.model, self.budget = model, budget
        self.pad_token_id, self.inputs = prompts.pad_token_id, prompts.inputs
        self.can_select = type(probe) in (DynamicCache, LstmState)
        few, more = (tensor_bytes(prompts.run([(self.pad_token_id,) * count]).cache) for count in (2, 6))
        self.token_bytes = (more - few) // 4
        self.row_bytes = few - 2 * self.token_bytes
        self.clear()

    def fits(self, rows: int, longest: int) -> bool:
        return self.budget is None or rows * (self.row_bytes + longest * self.token_bytes) <= self.budget

    def join(self, prefixes: Sequence[tuple[int, ...]], finals: Sequence[int]) -> Tensor:
        """See `KVMemory.join`; no rows may be there."""
        rows, places = distinct(prefixes) if self.can_select else (list(prefixes), list(range(len(prefixes))))
        self._tokens, mask = left_padded(rows, self.pad_token_id, self.model.device)
        self._kept = {"use_cache": True, "attention_mask": mask, "logits_to_keep": 1, "position_ids": positions(mask)}
        for name in ("attention_mask", "logits_to_keep", "position_ids"):
            if name not in self.inputs:
                del self._kept[name]
        if mask.all() and "attention_mask" in self._kept:
            self._kept["attention_mask"] = None  # as `generate` does: a model without padding computes no mask
        if "past_key_values" in self.inputs and self.model._supports_default_dynamic_cache():
            self._kept["past_key_values"] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        logits_BV = self._forward(is_first_iteration=True)
        self._live = list(range(len(rows)))
        self._left = [1] * len(rows)
        if len(rows) < len(prefixes):
            self._select(places)
            logits_BV = logits_BV[torch.tensor(places, device=logits_BV.device)]
        self._live = list(range(len(prefixes)))
        self._left = [final - len(prefix) for final, prefix in zip(finals, prefixes, strict=True)]
        return logits_BV

    def step(self, token_B: Tensor) -> Tensor:
        """See `KVMemory.step`."""
        gone = set(range(len(self._left))) - set(self._live)
        # A row that has ended runs along, but not past its limit: the model may have no position there.
        if self.can_select and gone and (
            len(self._live) <= _SELECT_AT * len(self._left) or any(self._left[row] <= 1 for row in gone)
        ):
            self._select(self._live)
        live = torch.tensor(self._live, device=token_B.device)
        new_B = token_B.new_full((len(self._left),), self.pad_token_id)
        new_B[live] = token_B
        self._tokens = torch.cat([self._tokens, new_B[:, None]], 1)
        self._left = [left - 1 for left in self._left]
        return self._forward(next_sequence_length=1)[live]

    def keep(self, kept: Sequence[int]) -> None:
        """See `KVMemory.keep`."""
        self._live = [self._live[row] for row in kept]
        if not kept:
            self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._tokens: Tensor | None = None
        self._kept: dict[str, Any] = {}
        self._live: list[int] = []  # places in the batch of the rows that go on
        self._left: list[int] = []  # tokens that each row of the batch may still write

    def free(self) -> None:
        self.clear()

    def _forward(self, **how: Any) -> Tensor:
        # What a step is given differs from model to model (names, masks, states): ask it as `generate` does.
        inputs = self.model.prepare_inputs_for_generation(self._tokens, **how, **self._kept)
        output = self.model(**inputs, return_dict=True)
        self._kept = self.model._update_model_kwargs_for_generation(output, self._kept)
        return output.logits[:, -1]

    def _select(self, rows: Sequence[int]) -> None:
        """These rows of the batch, in this order."""
        index = torch.tensor(rows, device=self.model.device)
        self._tokens = self._tokens[index]
        for name, value in self._kept.items():
            if name in _NAMES:
                value.reorder_cache(index)
            elif isinstance(value, Tensor):
                self._kept[name] = value[index]
        self._left = [self._left[row] for row in rows]
        self._live = list(range(len(rows)))


def tensor_bytes(thing: Any) -> int:
    """Of all tensors that it holds, each counted once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in _tensors(thing, set())}.values())


def _tensors(thing: Any, seen: set[int]) -> Iterable[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from _tensors(vars(thing), seen)
