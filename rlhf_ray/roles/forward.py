"""Forward passes over batches: the same for the learner, the reference policy and the critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.logprobs import entropy_at, logprobs_at
from rlhf_ray.roles.batch import Batch, pad_columns
from rlhf_ray.roles.division import Share
from rlhf_ray.roles.shared_prompts import Line, MicroBatch, shared_logits

Model = Callable[..., Any]  # a module or a TrainEngine: called with input_ids and attention_mask


def model_inputs(micro: Batch, device: torch.device) -> dict[str, Tensor]:
    # Rows are padded on the right, so positions 0..T-1 are right without position_ids.
    return {"input_ids": micro.tokens.to(device), "attention_mask": micro.attention_mask.long().to(device)}


def critic_values(model: Model, micro: Batch, device: torch.device) -> Tensor:
    """[B, T] values; index t is the value of the state in which token t is chosen, so it reads position t-1."""
    values_BT = model(**model_inputs(micro, device)).values.float()
    return torch.nn.functional.pad(values_BT[:, :-1], (1, 0))


@dataclass(frozen=True)
class Predictions:
    """What a causal language model says of each response token of a micro-batch."""

    logits_PV: Tensor  # of all places of the forward pass, prompts and padding too
    place_N: Tensor  # whose logits predict each of the N response tokens, row by row
    tokens_N: Tensor
    temperature_N: Tensor
    mask_BT: Tensor

    def logprobs(self) -> Tensor:
        """[B, T], 0 outside the response."""
        return self._in_rows(logprobs_at(self.logits_PV, self.place_N, self.tokens_N, self.temperature_N))

    def entropies(self) -> Tensor:
        """[B, T], 0 outside the response."""
        return self._in_rows(entropy_at(self.logits_PV, self.place_N, self.temperature_N))

    def _in_rows(self, value_N: Tensor) -> Tensor:
        zero_BT = torch.zeros(self.mask_BT.shape, dtype=value_N.dtype, device=value_N.device)
        return zero_BT.masked_scatter(self.mask_BT, value_N)


def predict(model: Model, micro: MicroBatch, *, temperature: float, device: torch.device) -> Predictions:
    """One forward pass.

    Args:
        temperature: where the rows have none of their own. The policy that is improved is the one that was sampled:
            at a row's own temperature its importance ratio starts at exactly 1.
    """
    if micro.answers:
        logits_PV, place_BT = shared_logits(model, micro, device)
    else:
        logits_PV = model(**model_inputs(micro, device), use_cache=False).logits.flatten(0, 1)
        place_BT = torch.arange(len(logits_PV), device=device).view(micro.tokens.shape)
    mask_BT = micro.response_mask.to(device)
    rows_B = torch.full((len(micro),), temperature) if micro.temperature is None else micro.temperature
    return Predictions(
        logits_PV,
        place_N=place_BT.roll(1, dims=1)[mask_BT],  # token t is predicted at t - 1
        tokens_N=micro.tokens.to(device)[mask_BT],
        temperature_N=rows_B.to(device)[:, None].expand(mask_BT.shape)[mask_BT],
        mask_BT=mask_BT,
    )


def over_microbatches(
    batch: Batch, parts: Sequence[Sequence[Line]], compute: Callable[[MicroBatch], Tensor]
) -> Tensor:
    """Apply `compute` ([b, t] a micro-batch) to each part, put the rows back in place. [B, T] on CPU, 0 elsewhere."""
    out_BT = torch.zeros(batch.tokens.shape)
    for lines in parts:
        values_bt = compute(MicroBatch.of(batch, lines)).detach().float().cpu()
        out_BT[[row for line in lines for row in line]] = pad_columns(values_bt, out_BT.shape[1])
    return out_BT


def over_shares(batch: Batch, shares: Sequence[Share], compute: Callable[[MicroBatch], Tensor]) -> Tensor:
    """The same for the micro-batches of these shares. Of several ranks each has its own rows, and all make as many
    forward passes, for each may be a collective."""
    out_BT = torch.zeros(batch.tokens.shape)
    for share in shares:
        out_BT += over_microbatches(batch, share.microbatches[: share.real], compute)
        for lines in share.microbatches[share.real :]:
            compute(MicroBatch.of(batch, lines))
    return out_BT
