"""Keys and values of the rows that are being written, in memory taken once: nothing is copied to grow by a token.

All rows end at the same column, so that a new token of each is one slice. A row that joins is copied in behind its
own prompt's pass through the model, wherever the others stand; where a row leaves, the last one takes its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from rlhf_ray.roles.decode_forward import AT_ONCE, PlainStep, PromptPass, distinct

_PLAIN = frozenset(vars(DynamicCache()))


def fits_architecture(model: PreTrainedModel, inputs: set[str], cache: Any) -> bool:
    """Whether this model's cache is keys and values alone, and their places say nothing but the order.

    Positions must be told apart from columns (`position_ids`), for rows join at any column.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        type(cache) is DynamicCache
        and set(vars(cache)) == _PLAIN
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and all(layer.is_initialized and layer.keys.dim() == 4 for layer in cache.layers)
        and inputs >= {"position_ids", "attention_mask", "past_key_values"}
        and kinds <= {"full_attention", "sliding_attention"}
        and getattr(config, "attention_chunk_size", None) is None
        and not getattr(config, "alibi", False)
    )


class Place:
    """Where the rows stand: the first `rows` of the memory, columns `first` to `end`."""

    def __init__(self) -> None:
        self.rows = self.first = self.end = 0


class FixedLayer(DynamicLayer):
    """A layer's keys and values in columns of the memory. A token is written behind the last one."""

    def __init__(self, place: Place, window: int | None) -> None:
        super().__init__()
        self.place, self.window = place, window
        self.is_sliding = window is not None
        self.is_initialized = True
        self.all_keys = self.all_values = torch.empty(0)  # [rows, heads, columns, size]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, end = self.place.rows, self.place.end
        behind = end + key_states.shape[-2]
        self.all_keys[:rows, :, end:behind] = key_states
        self.all_values[:rows, :, end:behind] = value_states
        first = self.first
        self.keys, self.values = self.all_keys[:rows, :, first:behind], self.all_values[:rows, :, first:behind]
        return self.keys, self.values

    @property
    def first(self) -> int:
        """The first column that the next token can attend to."""
        return self.place.first if self.window is None else max(self.place.first, self.place.end - self.window + 1)

    def get_seq_length(self) -> int:
        return self.place.end - self.place.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.end - self.first + query_length, self.first - self.place.first


class KVMemory:
    """The rows of a model whose cache is keys and values alone.

    Args:
        probe: a cache that the model has filled with a row or more: the layers' kinds and shapes.
        budget: bytes that may be taken; None: no bound. The passes of prompts take up to a quarter more, or one row.
    """

    joins_running = True  # rows join while others are being written

    def __init__(
        self, model: PreTrainedModel, prompts: PromptPass, probe: DynamicCache, budget: int | None
    ) -> None:
        self.model, self.prompts, self.budget = model, prompts, budget
        self.place = Place()
        self.layers = [FixedLayer(self.place, getattr(layer, "sliding_window", None)) for layer in probe.layers]
        self.cache = _cache_of(self.layers)
        self._shapes = [_shape(side) for layer in probe.layers for side in (layer.keys, layer.values)]
        self._stores: dict[tuple[Any, ...], Tensor] = {}  # shape -> [sides of layers, rows, heads, columns, size]
        self.token_bytes = sum(heads * size * dtype.itemsize for heads, size, dtype in self._shapes)
        self._at_once = AT_ONCE if budget is None else min(AT_ONCE, budget // (4 * self.token_bytes))
        self.rows = self.columns = 0
        self._lengths: list[int] = []  # columns of each row that are its own
        self._finals: list[int] = []  # what they can grow to
        self._masks = _Masks(model, self.layers)
        self._plain = PlainStep(model) if PlainStep.knows(model) else None

    def fits(self, rows: int, longest: int) -> bool:
        return self.budget is None or rows * _with_slack(longest) * self.token_bytes <= self.budget

    def join(self, prefixes: Sequence[tuple[int, ...]], finals: Sequence[int]) -> Tensor:
        """Take rows in; `finals`: how many tokens each can grow to. The logits of each one's next token. [B, V]"""
        known = len(self._lengths)
        self._lengths += map(len, prefixes)
        self._finals += finals
        self._make_room(known, len(self._lengths), _with_slack(max(self._finals)))
        self._seat(max(self.place.end, max(self._lengths)), known)
        self.place.rows = len(self._lengths)
        tokens, places = distinct(prefixes)
        logits_BV: Tensor | None = None
        for members, found in self.prompts.batches(tokens, self._at_once):
            index = {member: row for row, member in enumerate(members)}
            mine = [row for row, place in enumerate(places) if place in index]
            source = torch.tensor([index[places[row]] for row in mine], device=found.logits_BV.device)
            self._copy(found.cache.layers, source, [known + row for row in mine])
            if logits_BV is None:
                logits_BV = found.logits_BV.new_empty(len(prefixes), found.logits_BV.shape[-1])
            logits_BV[torch.tensor(mine, device=source.device)] = found.logits_BV[source]
        self._changed()
        return logits_BV

    def step(self, token_B: Tensor) -> Tensor:
        """One more token of each row: the logits of the next. [B, V]"""
        if self.place.end == self.columns:
            self._seat(max(self._lengths), len(self._lengths))
            self._changed()
        logits_BV = self._forward(token_B)
        self.place.end += 1
        self._position_B1 = self._position_B1 + 1
        self._lengths = [length + 1 for length in self._lengths]
        return logits_BV

    def _forward(self, token_B: Tensor) -> Tensor:
        if self._plain is not None:
            return self._plain(token_B, self._position_B1, self.layers, self._masks.of_layers())
        output = self.model(
            input_ids=token_B[:, None],
            position_ids=self._position_B1,
            attention_mask=self._masks.now(),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def keep(self, kept: Sequence[int]) -> None:
        """Only these rows go on: each stays where it is, or moves to an earlier place that nobody keeps."""
        moved = [(place, row) for place, row in enumerate(kept) if place != row]
        # From behind, so no place is read after it was written; a slice is copied faster than an index is looked up.
        for store in self._stores.values():
            live = store[:, :, :, self.place.first : self.place.end]
            for place, row in moved:
                live[:, place] = live[:, row]
        self._lengths = [self._lengths[row] for row in kept]
        self._finals = [self._finals[row] for row in kept]
        self.place.rows = len(kept)
        self._changed()

    def clear(self) -> None:
        """Forget all rows."""
        self._lengths, self._finals = [], []
        self.place.rows = self.place.first = self.place.end = 0

    def free(self) -> None:
        """Give the memory back as well."""
        self.clear()
        self.rows = self.columns = 0
        self._stores.clear()
        for layer in self.layers:
            layer.all_keys = layer.all_values = layer.keys = layer.values = torch.empty(0)

    def _changed(self) -> None:
        """Other rows, or the same in other columns."""
        if self._lengths:
            self.place.first = self.place.end - max(self._lengths)
            starts = [self.place.end - length for length in self._lengths]
            self._masks.build(starts, self.place, self.columns)
            self._position_B1 = torch.tensor(self._lengths, device=self.model.device)[:, None]
        else:
            self.clear()

    def _make_room(self, known: int, rows: int, columns: int) -> None:
        """Memory of at least this size, with the first `known` rows as they are."""
        if rows <= self.rows and columns <= self.columns:
            return
        larger = max(rows, self.rows), max(columns, self.columns)
        if self.budget is None or larger[0] * larger[1] * self.token_bytes <= self.budget:
            rows, columns = larger
        if known and self.place.end > columns:
            self._seat(max(self._lengths[:known]), known)
        before, self._stores = self._stores, {}
        for shape in dict.fromkeys(self._shapes):
            heads, size, dtype = shape
            # Zeros: a masked place that held NaN would spoil its row all the same.
            store = torch.zeros(
                self._shapes.count(shape), rows, heads, columns, size, dtype=dtype, device=self.model.device
            )
            if known:
                store[:, :known, :, : self.place.end] = before[shape][:, :known, :, : self.place.end]
            before.pop(shape, None)
            self._stores[shape] = store
        self.rows, self.columns = rows, columns
        taken: dict[tuple[Any, ...], int] = defaultdict(int)
        sides = []
        for shape in self._shapes:
            sides.append(self._stores[shape][taken[shape]])
            taken[shape] += 1
        for layer, keys, values in zip(self.layers, sides[::2], sides[1::2], strict=True):
            layer.all_keys, layer.all_values = keys, values

    def _seat(self, end: int, known: int) -> None:
        """Move the first `known` rows so that they end at this column."""
        if known and end != self.place.end:
            longest = max(self._lengths[:known])
            for store in self._stores.values():
                block = store[:, :known, :, self.place.end - longest : self.place.end].clone()
                store[:, :known, :, end - longest : end] = block
        self.place.end = end

    def _copy(self, layers: Sequence[CacheLayerMixin], source: Tensor, rows: list[int]) -> None:
        end = self.place.end
        into = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
        for mine, theirs in zip(self.layers, layers, strict=True):
            columns = slice(end - theirs.keys.shape[-2], end)  # a sliding layer keeps the last of them
            mine.all_keys[into, :, columns] = theirs.keys[source]
            mine.all_values[into, :, columns] = theirs.values[source]


class _Masks:
    """What the next token of each row may attend to."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[FixedLayer]) -> None:
        self.model, self.layers = model, layers
        config = model.config.get_text_config()
        # What Transformers itself gives to a model that it compiles: made once for all layers and steps.
        self.prepared = (
            getattr(model, "_can_compile_fullgraph", False)
            and not hasattr(model, "create_masks_for_generate")
            and config._attn_implementation in ("sdpa", "eager")
        )
        self.kinds = getattr(config, "layer_types", None)
        self.by_window = {layer.window: layer for layer in layers}
        self._mask: Tensor | None = None

    def build(self, starts: Sequence[int], place: Place, columns: int) -> None:
        self.place = place
        if all(start == place.first for start in starts):
            self._mask = None
            return
        device = self.model.device
        hidden_BC = torch.arange(columns, device=device) < torch.tensor(starts, device=device)[:, None]
        if self.prepared:
            dtype = self.model.dtype
            mask_BC = torch.zeros(hidden_BC.shape, dtype=dtype, device=device)
            self._mask = mask_BC.masked_fill_(hidden_BC, torch.finfo(dtype).min)[:, None, None]
        else:
            self._mask = (~hidden_BC).long()

    def now(self) -> Any:
        """For a token in column `end`."""
        if not self.prepared:
            return None if self._mask is None else self._mask[:, self.place.first : self.place.end + 1]
        if self.kinds is None:
            return self._of(self.layers[0])
        return {kind: self._of(layer) for kind, layer in dict(zip(self.kinds, self.layers, strict=False)).items()}

    def of_layers(self) -> list[Tensor | None]:
        """The same for each layer."""
        found = {layer.window: self._of(layer) for layer in self.by_window.values()}
        return [found[layer.window] for layer in self.layers]

    def _of(self, layer: FixedLayer) -> Tensor | None:
        return None if self._mask is None else self._mask[..., layer.first : self.place.end + 1]


def _with_slack(longest: int) -> int:
    """Columns for rows of this length: some more, so that the rows need not move back at every step."""
    return longest + longest // 4


def _shape(side: Tensor) -> tuple[int, int, torch.dtype]:
    return side.shape[1], side.shape[3], side.dtype


def _cache_of(layers: list[FixedLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache
