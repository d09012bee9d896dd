"""The one data structure that flows through a reinforcement-learning step.

Layout: every row is `prompt, completion, padding`, padded on the right. Every per-token tensor is `[B, T]`
and index t describes token t: `logp[:, t] = log p(token_t | token_<t)`, so `logp[:, 0]` is always 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.sample import Sample

_ROW_TYPES = {"truncated": np.bool_, "prompt_digests": np.uint64, "finite": np.bool_}  # of columns that are no int64


@dataclass(frozen=True, eq=False)
class Rows:
    """What a driver needs to know of a batch's N rows: columns of plain numbers, given as any sequences."""

    prompt_id: np.ndarray  # [N] int64
    lengths: np.ndarray  # [N] int64, tokens, prompt included
    response_lengths: np.ndarray  # [N] int64
    truncated: np.ndarray  # [N] bool
    weight_version: np.ndarray  # [N] int64, the oldest that produced a token of the row; -1 for an empty completion
    prompt_lengths: np.ndarray  # [N] int64, tokens before the first that the policy wrote
    prompt_digests: np.ndarray  # [N] uint64 of those tokens: rows with equal ones may share them in a forward pass
    finite: np.ndarray | None = None  # [N] bool, each of its `logp_gen` is a finite number; None: of every row

    def __post_init__(self) -> None:
        if self.finite is None:
            object.__setattr__(self, "finite", np.ones(len(self.prompt_id), np.bool_))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, np.asarray(getattr(self, f.name), _ROW_TYPES.get(f.name, np.int64)))

    @staticmethod
    def empty(count: int) -> Rows:
        """Rows of which nothing is known yet: columns to write into."""
        return Rows(**{f.name: np.zeros(count, _ROW_TYPES.get(f.name, np.int64)) for f in dataclasses.fields(Rows)})

    def __len__(self) -> int:
        return len(self.prompt_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and all(map(np.array_equal, vars(self).values(), vars(other).values()))

    def select(self, rows: Sequence[int]) -> Rows:
        """The given rows, in order."""
        index = np.asarray(rows, np.int64)
        return Rows(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order."""
        names = [f.name for f in dataclasses.fields(Rows)]
        return Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Batch:
    """Rollouts and everything computed about them. Never changed in place: use `replace`.

    Shapes: `B` rows, `T` tokens (the longest row). Optional fields are None until their role has run.
    """

    tokens: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, True on real tokens
    response_mask: Tensor  # [B, T] bool, True on completion tokens (EOS included): what the loss sees
    logp_gen: Tensor  # [B, T] float32, what the generator says it sampled with; 0 outside the response
    weight_version: Tensor  # [B, T] int32, weights that wrote each token; -1 outside the response and in given answers
    prompt_id: Tensor  # [B] int64, position in the run's prompt stream; equal ids form a group
    sample_id: Tensor  # [B] int64, unique in a run
    truncated: Tensor  # [B] bool, stopped by the token limit, not by EOS
    columns: tuple[Mapping[str, Any], ...]  # [B] dataset columns of each row's prompt, for reward functions
    chats: tuple[Any, ...]  # [B] each row's prompt as a conversation (data/chat.py), for judges; None: a plain text
    temperature: Tensor | None = None  # [B] float32, what each row was sampled at; None: all at rollout.temperature
    score: Tensor | None = None  # [B] float32, the reward of the whole completion
    baseline: Tensor | None = None  # [B] float32, the reward of the greedy answer to the same prompt (ReMax)
    logp_old: Tensor | None = None  # [B, T] the learner before this step's update
    logp_ref: Tensor | None = None  # [B, T] the reference policy
    values: Tensor | None = None  # [B, T] the critic; index t is the value before token t is chosen
    advantages: Tensor | None = None  # [B, T], or [B] where all tokens of an answer have the same
    returns: Tensor | None = None  # [B, T] the critic's target

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, prompt included. [B] int64"""
        return self.attention_mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """Tokens of each row before its first response token; all of them where there is none. [B] int64"""
        some_B = self.response_mask.any(1)
        return torch.where(some_B, self.response_mask.int().argmax(1), self.lengths)

    @property
    def rows(self) -> Rows:
        newest = torch.iinfo(torch.int32).max
        prompts = self.prompt_lengths.tolist()
        oldest_B = self.weight_version.masked_fill(~self.response_mask, newest).amin(1)
        return Rows(
            prompt_id=self.prompt_id,
            lengths=self.lengths,
            response_lengths=self.response_mask.sum(1),
            truncated=self.truncated,
            weight_version=oldest_B.masked_fill(oldest_B == newest, -1),
            prompt_lengths=prompts,
            prompt_digests=[_digest(row[:n]) for row, n in zip(self.tokens.numpy(), prompts, strict=True)],
            finite=(self.logp_gen.isfinite() | ~self.response_mask).all(1),
        )

    def writer_of(self, row: int) -> str:
        """Who has written this row, by name."""
        return "the generator"

    def replace(self, **fields: Any) -> Batch:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def select(self, rows: Sequence[int] | Tensor, *, trim: bool = True) -> Batch:
        """The given rows (indices, or a [B] bool mask) in order; `trim` cuts the padding that none of them needs."""
        index = torch.as_tensor(rows)
        # A mask taken for indices would silently pick rows 0 and 1 over and over.
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        width = int(self.attention_mask[index].sum(1).max()) if trim and len(index) else self.tokens.shape[1]
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(Batch):
            value = getattr(self, field.name)
            if value is None:
                picked[field.name] = None
            elif isinstance(value, tuple):
                picked[field.name] = tuple(value[i] for i in index.tolist())
            else:
                value = value[index]
                picked[field.name] = value[:, :width] if value.dim() == 2 else value
        return Batch(**picked)

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """Rows of all parts in order, padded to the widest part. All parts must hold the same optional fields."""
        width = max(part.tokens.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(Batch):
            values = [getattr(part, field.name) for part in parts]
            if any(value is None for value in values):
                if not all(value is None for value in values):
                    raise ValueError(
                        f"Batch.cat: some parts have '{field.name}' and some do not; compute it for all or for none"
                    )
                joined[field.name] = None
            elif isinstance(values[0], tuple):
                joined[field.name] = tuple(row for value in values for row in value)
            else:
                joined[field.name] = torch.cat([pad_columns(value, width, field.name) for value in values])
        return Batch(**joined)


def _digest(tokens: np.ndarray) -> int:
    return int.from_bytes(blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


def gather(parts: Sequence[tuple[Batch, Sequence[int]]]) -> Batch:
    """One batch from the given rows of several."""
    return Batch.cat([batch.select(rows) for batch, rows in parts])


# Padding that means "nothing here": an ordinary 0 would be a real weight version.
PAD_VALUE = {"weight_version": -1}


def pad_columns(value: Tensor, width: int, name: str = "") -> Tensor:
    """Widen a `[B, T]` tensor on the right to `[B, width]`; `[B]` tensors pass through."""
    if value.dim() != 2 or value.shape[1] == width:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=PAD_VALUE.get(name, 0))


def batch_of(
    samples: Sequence[Sample], columns: Sequence[Mapping[str, Any]], chats: Sequence[Any], *, pad_token_id: int = 0
) -> Batch:
    """The samples as rows, in order, with the columns and the conversation of each one's prompt."""
    B, T = len(samples), max(map(len, samples))
    tokens = np.full((B, T), pad_token_id, np.int64)
    attention, response = np.zeros((B, T), np.bool_), np.zeros((B, T), np.bool_)
    logp_gen, version = np.zeros((B, T), np.float32), np.full((B, T), PAD_VALUE["weight_version"], np.int32)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample)] = sample.tokens
        attention[row, : len(sample)] = True
        written = 0
        for start, end in sample.spans:
            part = slice(written, written + end - start)
            response[row, start:end] = True
            logp_gen[row, start:end], version[row, start:end] = sample.logprobs[part], sample.versions[part]
            written = part.stop
    return Batch(
        tokens=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(attention),
        response_mask=torch.from_numpy(response),
        logp_gen=torch.from_numpy(logp_gen),
        weight_version=torch.from_numpy(version),
        prompt_id=torch.tensor([sample.prompt_id for sample in samples], dtype=torch.long),
        sample_id=torch.tensor([sample.sample_id for sample in samples], dtype=torch.long),
        truncated=torch.tensor([sample.truncated for sample in samples], dtype=torch.bool),
        columns=tuple(columns),
        chats=tuple(chats),
    )


def build_batch(
    requests: Sequence[Any],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    truncated: Sequence[bool],
    weight_version: int,
    pad_token_id: int = 0,
) -> Batch:
    """A Batch of single answers to requests (see `roles.protocols.Request`), all written by the same weights.

    Args:
        completions: [B] sampled token ids, EOS included where it was sampled.
        logprobs: [B] log-probability of each of those tokens, under the sampling distribution.
    """
    samples = [
        Sample.answer(
            r.prompt_id, r.sample_id, r.token_ids, completion, logps, weight_version, "length" if cut else "stop"
        )
        for r, completion, logps, cut in zip(requests, completions, logprobs, truncated, strict=True)
    ]
    return batch_of(samples, [r.columns for r in requests], [r.chat for r in requests], pad_token_id=pad_token_id)
