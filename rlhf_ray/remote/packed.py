"""Rows without padding: how a batch lies in memory between workers, and how it travels.

A `Packed` holds any columns of any rows. What one worker holds for another is cut out of it and sent as one object
(`select`); the receiver puts the pieces side by side (`cat`) and makes the `Batch` that it computes with (`unpack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.roles.batch import PAD_VALUE, Batch

# The types that columns travel in: a token id needs no 8 bytes.
TOKENS = {"tokens": np.int32, "response_mask": np.bool_}  # a number a token
WRITTEN = {  # a number a token that the policy wrote
    "logp_gen": np.float32, "weight_version": np.int32, "logp_old": np.float32, "logp_ref": np.float32,
    "values": np.float32, "advantages": np.float32, "returns": np.float32,
}  # fmt: skip
ROWS = ("prompt_id", "sample_id", "truncated")  # a number a row


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of unequal length, one behind the other."""

    values: np.ndarray  # [the sum of lengths]
    lengths: np.ndarray  # [N] int64

    def select(self, rows: np.ndarray) -> Ragged:
        lengths = self.lengths[rows]
        starts, ends = (np.cumsum(self.lengths) - self.lengths)[rows], np.cumsum(lengths)
        index = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        return Ragged(self.values[index], lengths)

    @staticmethod
    def cat(parts: Sequence[Ragged]) -> Ragged:
        return Ragged(np.concatenate([p.values for p in parts]), np.concatenate([p.lengths for p in parts]))


@dataclass(frozen=True, eq=False)
class Packed:
    """Some columns of N rows."""

    ragged: Mapping[str, Ragged] = field(default_factory=dict)
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)  # [N] each

    def select(self, rows: np.ndarray, names: Iterable[str] | None = None) -> Packed:
        """The given rows in order, of the named columns or of all."""
        wanted = {*self.ragged, *self.rows} if names is None else set(names)
        return Packed(
            {name: column.select(rows) for name, column in self.ragged.items() if name in wanted},
            {name: column[rows] for name, column in self.rows.items() if name in wanted},
        )

    @staticmethod
    def cat(parts: Sequence[Packed]) -> Packed:
        """The rows of all parts in order; they have the same columns."""
        return Packed(
            {name: Ragged.cat([part.ragged[name] for part in parts]) for name in parts[0].ragged},
            {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows},
        )

    @staticmethod
    def joined(parts: Sequence[Packed]) -> Packed:
        """The columns of all parts, which have the same rows."""
        return Packed(
            {name: column for part in parts for name, column in part.ragged.items()},
            {name: column for part in parts for name, column in part.rows.items()},
        )

    @property
    def nbytes(self) -> int:
        ragged = sum(column.values.nbytes + column.lengths.nbytes for column in self.ragged.values())
        return ragged + sum(column.nbytes for column in self.rows.values())


def pack(batch: Batch) -> Packed:
    """Everything of a batch but its texts and what the driver knows of its rows."""
    lengths = batch.lengths.numpy()
    ragged = {
        name: Ragged(getattr(batch, name)[batch.attention_mask].numpy().astype(kind), lengths)
        for name, kind in TOKENS.items()
    }
    for name in WRITTEN:
        column = getattr(batch, name)
        if column is not None and column.dim() == 2:
            ragged[name] = pack_column(name, column, batch.response_mask)
    return Packed(ragged, {name: getattr(batch, name).numpy() for name in ROWS})


def pack_column(name: str, column_BT: Tensor, mask_BT: Tensor) -> Ragged:
    """A column that is 0 outside of the response, by the type that it travels in."""
    return Ragged(column_BT[mask_BT].numpy().astype(WRITTEN[name]), mask_BT.sum(1).numpy())


def unpack(packed: Packed, values: Mapping[str, Tensor], texts: Mapping[str, tuple[Any, ...]]) -> Batch:
    """A batch of these rows, padded to the longest.

    Args:
        packed: with `TOKENS` and `ROWS`, and any of `WRITTEN`.
        values: further columns, such as [N] tensors.
        texts: `columns` and `chats`, for those who read them.
    """
    tokens = packed.ragged["tokens"]
    lengths_B = torch.from_numpy(tokens.lengths)
    N, T = len(lengths_B), int(lengths_B.max()) if len(lengths_B) else 0
    attention_BT = torch.arange(T)[None] < lengths_B[:, None]
    columns: dict[str, Tensor] = {
        "attention_mask": attention_BT,
        "tokens": _padded(tokens, attention_BT).long(),
        "response_mask": _padded(packed.ragged["response_mask"], attention_BT),
        # What every batch has, also where nobody reads it.
        "logp_gen": torch.zeros(N, T),
        "weight_version": torch.full((N, T), PAD_VALUE["weight_version"], dtype=torch.int32),
    }
    for name in WRITTEN:
        if name in packed.ragged:
            columns[name] = _padded(packed.ragged[name], columns["response_mask"], PAD_VALUE.get(name, 0))
    for name in ROWS:
        columns[name] = torch.from_numpy(packed.rows[name].copy())
    read = {name: texts.get(name, (None,) * N) for name in ("columns", "chats")}
    return Batch(**columns, **read, **values)


def _padded(column: Ragged, mask_BT: Tensor, empty: float = 0) -> Tensor:
    values_N = torch.from_numpy(column.values.copy())  # what Ray hands out cannot be written to
    out_BT = torch.full(mask_BT.shape, empty, dtype=values_N.dtype)
    out_BT[mask_BT] = values_N
    return out_BT


def empty_rows(like: Packed, lengths: Sequence[int]) -> Packed:
    """Rows of so many tokens that nobody wrote: they cost a forward pass and change nothing."""
    counts, nothing = np.asarray(lengths, np.int64), np.zeros(len(lengths), np.int64)
    ragged = {
        name: Ragged(np.zeros((counts if name in TOKENS else nothing).sum(), column.values.dtype),
                     counts if name in TOKENS else nothing)
        for name, column in like.ragged.items()
    }  # fmt: skip
    return Packed(ragged, {name: np.zeros(len(lengths), column.dtype) for name, column in like.rows.items()})
