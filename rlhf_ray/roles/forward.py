"""Forward passes over batches: the same for the learner, the reference policy and the critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.batch import Batch, pad_columns
from rlhf_ray.roles.microbatch import split_microbatches
from rlhf_ray.roles.packing import pack_numbers, packed_logits, plan_packs, rows_of

Model = Callable[..., Any]  # a module or a TrainEngine: called with input_ids and attention_mask


def model_inputs(micro: Batch, device: torch.device) -> dict[str, Tensor]:
    # Rows are padded on the right, so positions 0..T-1 are right without position_ids.
    return {"input_ids": micro.tokens.to(device), "attention_mask": micro.attention_mask.long().to(device)}


def policy_logits(model: Model, micro: Batch, device: torch.device) -> Tensor:
    """[B, T, V] logits of a causal language model."""
    if micro.pack is not None:
        return packed_logits(model, micro, device)
    return model(**model_inputs(micro, device), use_cache=False).logits


def critic_values(model: Model, micro: Batch, device: torch.device) -> Tensor:
    """[B, T] values; index t is the value of the state in which token t is chosen, so it reads position t-1."""
    values_BT = model(**model_inputs(micro, device)).values.float()
    return torch.nn.functional.pad(values_BT[:, :-1], (1, 0))


def row_temperature(micro: Batch, default: float, device: torch.device) -> float | Tensor:
    """What each row was sampled at: one number, or [B] where the members of a group differ.

    The policy that is improved is the one that was sampled: at a row's own temperature its importance ratio starts
    at exactly 1.
    """
    return default if micro.temperature is None else micro.temperature.to(device)


def response_logprobs(model: Model, micro: Batch, *, temperature: float, device: torch.device) -> Tensor:
    """[B, T] log-probabilities, 0 outside the response; `temperature` where the batch has none of its own."""
    logits_BTV = policy_logits(model, micro, device)
    own = row_temperature(micro, temperature, device)
    logp_BT = token_logprobs(logits_BTV, micro.tokens.to(device), temperature=own)
    return logp_BT * micro.response_mask.to(device)


def over_microbatches(
    batch: Batch, parts: Sequence[Sequence[int]], compute: Callable[[Batch], Tensor]
) -> Tensor:
    """Apply `compute` ([b, t] a micro-batch) to each part, put the rows back in place. [B, T] on CPU, 0 elsewhere."""
    out_BT = torch.zeros(batch.tokens.shape)
    for rows in parts:
        micro = batch.select(rows)
        out_BT[list(rows)] = pad_columns(compute(micro).detach().float().cpu(), out_BT.shape[1])
    return out_BT


def batched_logprobs(
    model: Model, batch: Batch, *, temperature: float, max_tokens: int, pack_tokens: int, device: torch.device
) -> Tensor:
    """[B, T] response log-probabilities of a whole batch, computed in micro-batches of at most `max_tokens`."""
    packs, sizes = plan_packs(batch, range(len(batch)), pack_tokens)
    if pack_tokens:
        batch = batch.replace(pack=pack_numbers(batch, packs))
    parts = [rows_of(packs, part) for part in split_microbatches(range(len(packs)), sizes, max_tokens)]
    return over_microbatches(
        batch, parts, lambda micro: response_logprobs(model, micro, temperature=temperature, device=device)
    )
