"""Token log-probabilities and entropies from logits, without a second tensor of the logits' size.

`logprobs_at` and `entropy_at` take the logits of any P places and say which of them predicts each of N tokens: so
prompt and padding cost nothing, and tokens that follow the same text may share a place. `token_logprobs` and
`token_entropy` do it for whole rows: index t describes token t, the logits at t-1 predict it, and column 0 (which
nothing predicts) is 0.

All keep only the caller's logits for the backward pass and work in float32 on slices of a bounded size: a plain
`log_softmax` in float32 holds two more copies of the largest tensor of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 64 MiB of float32 a slice. On a CPU 16: larger ones come fresh from the system each time, and each page costs a fault.
SLICE_ELEMENTS = 1 << 24
CPU_SLICE_ELEMENTS = 1 << 22


def token_logprobs(
    logits_BTV: Tensor, tokens_BT: Tensor, temperature: float | Tensor = 1.0, mask_BT: Tensor | None = None
) -> Tensor:
    """logp_BT[:, t] = log softmax(logits_BTV[:, t-1] / temperature)[tokens_BT[:, t]], and 0 for t = 0.

    `temperature` is a number or one a row ([B]). The result is float32 (float64 for float64 logits). With a mask,
    only the tokens that it names are computed; the others are 0.
    """
    tokens_BT, mask_BT = tokens_BT[:, 1:], _predicted(logits_BTV, mask_BT)
    place_N, temperature_N = _places(logits_BTV, mask_BT, temperature)
    return _in_rows(logprobs_at(logits_BTV.flatten(0, 1), place_N, tokens_BT[mask_BT], temperature_N), mask_BT)


def token_entropy(logits_BTV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """entropy_BT[:, t] = entropy in nats of the distribution token t was drawn from, and 0 for t = 0."""
    mask_BT = _predicted(logits_BTV, None)
    return _in_rows(entropy_at(logits_BTV.flatten(0, 1), *_places(logits_BTV, mask_BT, temperature)), mask_BT)


def logprobs_at(logits_PV: Tensor, place_N: Tensor, tokens_N: Tensor, temperature_N: Tensor) -> Tensor:
    """logp_N[i] = log softmax(logits_PV[place_N[i]] / temperature_N[i])[tokens_N[i]], in float32 or float64."""
    return _LogprobsAt.apply(logits_PV, place_N, tokens_N, temperature_N.to(_compute_dtype(logits_PV)))


def entropy_at(logits_PV: Tensor, place_N: Tensor, temperature_N: Tensor) -> Tensor:
    """entropy_N[i] = entropy in nats of softmax(logits_PV[place_N[i]] / temperature_N[i])."""
    return _EntropyAt.apply(logits_PV, place_N, temperature_N.to(_compute_dtype(logits_PV)))


def _predicted(logits_BTV: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Which tokens after the first of each row are wanted. [B, T - 1]"""
    if mask_BT is None:
        mask_BT = torch.ones(logits_BTV.shape[:2], dtype=torch.bool, device=logits_BTV.device)
    return mask_BT[:, 1:]


def _places(logits_BTV: Tensor, mask_BT: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Place and temperature of every wanted token. [N], [N]"""
    B, T, _ = logits_BTV.shape
    place_BT = torch.arange(B * T, device=logits_BTV.device).view(B, T)[:, :-1]
    dtype = _compute_dtype(logits_BTV)
    temperature_B = torch.as_tensor(temperature, dtype=dtype, device=logits_BTV.device).expand(B)
    return place_BT[mask_BT], temperature_B[:, None].expand(place_BT.shape)[mask_BT]


def _in_rows(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T] from the values of the wanted tokens, 0 elsewhere and in column 0."""
    value_BT = torch.zeros(mask_BT.shape, dtype=value_N.dtype, device=value_N.device)
    return torch.nn.functional.pad(value_BT.masked_scatter(mask_BT, value_N), (1, 0))


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled_slices(logits_PV: Tensor, place_N: Tensor, temperature_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A slice of the N tokens, and their logits / temperature. [n, V]"""
    elements = CPU_SLICE_ELEMENTS if logits_PV.device.type == "cpu" else SLICE_ELEMENTS
    step = max(1, elements // logits_PV.shape[1])
    for start in range(0, len(place_N), step):
        part = slice(start, start + step)
        yield part, logits_PV[place_N[part]].to(temperature_N.dtype).div_(temperature_N[part, None])


def _add_at(grad_PV: Tensor, place_n: Tensor, piece_nV: Tensor) -> None:
    """Adds each row of the piece at its place, in the same order each time, though places may repeat.

    On a GPU `index_put_` sorts and `index_add_` races; on a CPU it is `index_put_` that races, between threads.
    """
    piece_nV = piece_nV.to(grad_PV.dtype)
    if grad_PV.device.type == "cpu":
        grad_PV.index_add_(0, place_n, piece_nV)
    else:
        grad_PV.index_put_((place_n,), piece_nV, accumulate=True)


class _LogprobsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_PV: Tensor, place_N: Tensor, tokens_N: Tensor, temperature_N: Tensor) -> Tensor:
        logp_N, lse_N = torch.empty_like(temperature_N), torch.empty_like(temperature_N)
        for part, scaled in _scaled_slices(logits_PV, place_N, temperature_N):
            lse_N[part] = scaled.logsumexp(-1)
            logp_N[part] = scaled.gather(-1, tokens_N[part, None])[:, 0] - lse_N[part]
        ctx.save_for_backward(logits_PV, place_N, tokens_N, temperature_N, lse_N)
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        logits_PV, place_N, tokens_N, temperature_N, lse_N = ctx.saved_tensors
        grad_PV = torch.zeros_like(logits_PV)
        slope_N1 = (grad_N / temperature_N)[:, None]
        for part, scaled in _scaled_slices(logits_PV, place_N, temperature_N):
            piece = scaled.sub_(lse_N[part, None]).exp_().mul_(-slope_N1[part])
            piece.scatter_add_(-1, tokens_N[part, None], slope_N1[part])
            _add_at(grad_PV, place_N[part], piece)
        return grad_PV, None, None, None


class _EntropyAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_PV: Tensor, place_N: Tensor, temperature_N: Tensor) -> Tensor:
        entropy_N = torch.empty_like(temperature_N)
        for part, scaled in _scaled_slices(logits_PV, place_N, temperature_N):
            # A banned token has probability 0 and log-probability -inf; their product must be 0, not NaN.
            entropy_N[part] = torch.special.entr(scaled.softmax(-1)).sum(-1)
        ctx.save_for_backward(logits_PV, place_N, temperature_N, entropy_N)
        return entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        logits_PV, place_N, temperature_N, entropy_N = ctx.saved_tensors
        grad_PV = torch.zeros_like(logits_PV)
        slope_N1 = (grad_N / temperature_N)[:, None]
        for part, scaled in _scaled_slices(logits_PV, place_N, temperature_N):
            prob = scaled.softmax(-1)
            # dH/dz_i = -p_i (log p_i + H)
            piece = (torch.special.entr(prob) - prob * entropy_N[part, None]) * slope_N1[part]
            _add_at(grad_PV, place_N[part], piece)
        return grad_PV, None, None
