"""The one data structure that flows through a reinforcement-learning step.

Layout: every row is `prompt, completion, padding`, padded on the right. Every per-token tensor is `[B, T]`
and index t describes token t: `logp[:, t] = log p(token_t | token_<t)`, so `logp[:, 0]` is always 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What a driver needs to know of a batch's rows: plain numbers, no tensors."""

    prompt_id: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens, prompt included
    response_lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    weight_version: tuple[int, ...]  # the oldest that produced a token of the row; -1 for an empty completion

    def __len__(self) -> int:
        return len(self.prompt_id)

    def select(self, rows: Sequence[int]) -> Rows:
        """The given rows, in order."""
        return Rows(**{f.name: tuple(getattr(self, f.name)[i] for i in rows) for f in dataclasses.fields(self)})

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order."""
        names = [f.name for f in dataclasses.fields(Rows)]
        return Rows(**{name: tuple(value for part in parts for value in getattr(part, name)) for name in names})


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
    advantages: Tensor | None = None  # [B, T]
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
        oldest_B = self.weight_version.masked_fill(~self.response_mask, newest).amin(1)
        return Rows(
            prompt_id=tuple(self.prompt_id.tolist()),
            lengths=tuple(self.lengths.tolist()),
            response_lengths=tuple(self.response_mask.sum(1).tolist()),
            truncated=tuple(self.truncated.tolist()),
            weight_version=tuple(oldest_B.masked_fill(oldest_B == newest, -1).tolist()),
        )

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


def gather(parts: Sequence[tuple[Batch, Sequence[int]]]) -> Batch:
    """One batch from the given rows of several."""
    return Batch.cat([batch.select(rows) for batch, rows in parts])


# Padding that means "nothing here": an ordinary 0 would be a real weight version.
_PAD_VALUE = {"weight_version": -1}


def pad_columns(value: Tensor, width: int, name: str = "") -> Tensor:
    """Widen a `[B, T]` tensor on the right to `[B, width]`; `[B]` tensors pass through."""
    if value.dim() != 2 or value.shape[1] == width:
        return value
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=_PAD_VALUE.get(name, 0))


def build_batch(
    requests: Sequence[Any],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    *,
    truncated: Sequence[bool],
    weight_version: int,
    pad_token_id: int = 0,
) -> Batch:
    """A Batch from what a generator returned for its requests (see `roles.protocols.Request`).

    Args:
        completions: [B] sampled token ids, EOS included where it was sampled.
        logprobs: [B] log-probability of each of those tokens, under the sampling distribution.
    """
    for request, completion, logps in zip(requests, completions, logprobs, strict=True):
        if len(completion) != len(logps):
            raise ValueError(
                f"sample {request.sample_id} has {len(completion)} tokens and {len(logps)} log-probabilities"
            )
    prompts_B1 = torch.tensor([len(r.token_ids) for r in requests])[:, None]
    lengths_B1 = prompts_B1 + torch.tensor([len(c) for c in completions])[:, None]
    t_1T = torch.arange(int(lengths_B1.max()))[None]
    attention_mask = t_1T < lengths_B1
    response_mask = attention_mask & (t_1T >= prompts_B1)
    # Row by row, as a mask takes them; a tensor for each row would take ten times as long.
    written = [token for r, c in zip(requests, completions, strict=True) for part in (r.token_ids, c) for token in part]
    tokens = torch.full(attention_mask.shape, pad_token_id, dtype=torch.long)
    tokens[attention_mask] = torch.tensor(written, dtype=torch.long)
    logp_gen = torch.zeros(attention_mask.shape)
    logp_gen[response_mask] = torch.tensor([logp for logps in logprobs for logp in logps], dtype=torch.float32)
    return Batch(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=response_mask,
        logp_gen=logp_gen,
        weight_version=torch.where(response_mask, weight_version, -1).to(torch.int32),
        prompt_id=torch.tensor([r.prompt_id for r in requests], dtype=torch.long),
        sample_id=torch.tensor([r.sample_id for r in requests], dtype=torch.long),
        truncated=torch.tensor(list(truncated), dtype=torch.bool),
        columns=tuple(r.columns for r in requests),
        chats=tuple(r.chat for r in requests),
    )
