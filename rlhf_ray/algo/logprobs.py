"""Token log-probabilities and entropies from logits, without a second [B, T, V] tensor.

Index t describes token t: the logits at t-1 predict token t, and column 0 (which nothing predicts) is 0.
Both functions keep only the caller's logits for the backward pass and work in float32 on slices of a bounded
size: a plain `log_softmax` in float32 holds two more copies of the largest tensor of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_ELEMENTS = 1 << 24  # 64 MiB of float32 a slice


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """logp_BT[:, t] = log softmax(logits_BTV[:, t-1] / temperature)[tokens_BT[:, t]], and 0 for t = 0.

    `temperature` is a number or one a row ([B]). The result is float32 (float64 for float64 logits).
    """
    return _TokenLogprobs.apply(logits_BTV, tokens_BT, _as_column(temperature, logits_BTV))


def token_entropy(logits_BTV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """entropy_BT[:, t] = entropy in nats of the distribution token t was drawn from, and 0 for t = 0."""
    return _TokenEntropy.apply(logits_BTV, _as_column(temperature, logits_BTV))


def _as_column(temperature: float | Tensor, logits_BTV: Tensor) -> Tensor:
    dtype = _compute_dtype(logits_BTV)
    column_B = torch.as_tensor(temperature, dtype=dtype, device=logits_BTV.device).reshape(-1)
    return column_B.expand(logits_BTV.shape[0])[:, None, None]


def _compute_dtype(logits_BTV: Tensor) -> torch.dtype:
    return torch.float64 if logits_BTV.dtype == torch.float64 else torch.float32


def _slices(shape_BTV: torch.Size) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, logit positions, token positions) that cover every predicted token."""
    B, T, V = shape_BTV
    columns = max(1, min(T, SLICE_ELEMENTS // V))
    rows = max(1, SLICE_ELEMENTS // (columns * V))
    for b in range(0, B, rows):
        for t in range(0, T - 1, columns):
            end = min(t + columns, T - 1)
            yield slice(b, b + rows), slice(t, end), slice(t + 1, end + 1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BTV: Tensor, tokens_BT: Tensor, temperature_B11: Tensor) -> Tensor:
        dtype = _compute_dtype(logits_BTV)
        logp_BT = logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=dtype)
        lse_BT = torch.zeros_like(logp_BT)
        for rows, before, at in _slices(logits_BTV.shape):
            scaled = logits_BTV[rows, before].to(dtype) / temperature_B11[rows]
            lse_BT[rows, at] = scaled.logsumexp(-1)
            picked = scaled.gather(-1, tokens_BT[rows, at].unsqueeze(-1)).squeeze(-1)
            logp_BT[rows, at] = picked - lse_BT[rows, at]
        ctx.save_for_backward(logits_BTV, tokens_BT, temperature_B11, lse_BT)
        return logp_BT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BT: Tensor):
        logits_BTV, tokens_BT, temperature_B11, lse_BT = ctx.saved_tensors
        grad_BTV = torch.zeros_like(logits_BTV)
        for rows, before, at in _slices(logits_BTV.shape):
            scaled = logits_BTV[rows, before].to(lse_BT.dtype) / temperature_B11[rows]
            slope = (grad_BT[rows, at] / temperature_B11[rows, 0]).unsqueeze(-1)
            piece = (scaled - lse_BT[rows, at].unsqueeze(-1)).exp_().mul_(-slope)
            piece.scatter_add_(-1, tokens_BT[rows, at].unsqueeze(-1), slope)
            grad_BTV[rows, before] = piece.to(grad_BTV.dtype)
        return grad_BTV, None, None


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BTV: Tensor, temperature_B11: Tensor) -> Tensor:
        dtype = _compute_dtype(logits_BTV)
        entropy_BT = logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=dtype)
        for rows, before, at in _slices(logits_BTV.shape):
            logp = (logits_BTV[rows, before].to(dtype) / temperature_B11[rows]).log_softmax(-1)
            # A banned token has probability 0 and log-probability -inf; their product must be 0, not NaN.
            entropy_BT[rows, at] = torch.special.entr(logp.exp()).sum(-1)
        ctx.save_for_backward(logits_BTV, temperature_B11, entropy_BT)
        return entropy_BT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BT: Tensor):
        logits_BTV, temperature_B11, entropy_BT = ctx.saved_tensors
        grad_BTV = torch.zeros_like(logits_BTV)
        for rows, before, at in _slices(logits_BTV.shape):
            logp = (logits_BTV[rows, before].to(entropy_BT.dtype) / temperature_B11[rows]).log_softmax(-1)
            prob = logp.exp()
            # dH/dz_i = -p_i (log p_i + H)
            piece = torch.special.entr(prob) - prob * entropy_BT[rows, at].unsqueeze(-1)
            piece = piece * (grad_BT[rows, at] / temperature_B11[rows, 0]).unsqueeze(-1)
            grad_BTV[rows, before] = piece.to(grad_BTV.dtype)
        return grad_BTV, None
