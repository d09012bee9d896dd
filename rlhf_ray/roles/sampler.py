"""Draws tokens with keyed random numbers: what a row draws depends on its own seed, place and logits only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from rlhf_ray.roles.protocols import Sampling


def draw(
    logits_BV: Tensor, u_B: Tensor, temperatures: Sequence[float], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """A token of each row by inverting its cumulative distribution, and that token's log-probability. [B] each

    Args:
        u_B: a uniform number in (0, 1) for each row.
        temperatures: of each row; at 0 a row is greedy, and its log-probability that at temperature 1.
        sampling: its `top_k` and `top_p` count; they cut what `temperatures` made, as Transformers does.
    """
    p_BV = _truncated(_scaled(logits_BV.float(), temperatures), sampling).softmax(-1)
    if max(temperatures) == 0:
        token_B = p_BV.argmax(-1)
    else:
        token_B = sample_by_inversion(p_BV, u_B)
        if min(temperatures) == 0:
            greedy_B = torch.tensor([temperature == 0 for temperature in temperatures], device=token_B.device)
            token_B = torch.where(greedy_B, p_BV.argmax(-1), token_B)
    return token_B, p_BV.gather(-1, token_B[:, None])[:, 0].log()


def _scaled(logits_BV: Tensor, temperatures: Sequence[float]) -> Tensor:
    if len(set(temperatures)) > 1:
        return logits_BV / torch.tensor([t or 1.0 for t in temperatures], device=logits_BV.device)[:, None]
    return logits_BV if temperatures[0] in (0, 1) else logits_BV / temperatures[0]


def _truncated(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k > 0:
        logits_BV = TopKLogitsWarper(sampling.top_k)(None, logits_BV)
    if sampling.top_p < 1:
        logits_BV = TopPLogitsWarper(sampling.top_p)(None, logits_BV)
    return logits_BV


def sample_by_inversion(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token whose slice of the cumulative distribution contains u. [B] int64"""
    # Float32 sums of a 150k vocabulary end near 1, not at 1: scale u by the real end, never point past it.
    cdf_BV = p_BV.cumsum(-1)
    target_B1 = (u_B.to(cdf_BV.dtype) * cdf_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=p_BV.shape[-1] - 1)
    # Rounding could land on a token that top-p removed (probability 0): take the likeliest instead.
    impossible_B = p_BV.gather(-1, token_B[:, None])[:, 0] == 0
    return torch.where(impossible_B, p_BV.argmax(-1), token_B) if impossible_B.any() else token_B


_MASK63 = (1 << 63) - 1


def seeds_of(seeds: Sequence[int]) -> Tensor:
    """Seeds as `keyed_uniform` takes them. [B] int64"""
    return torch.tensor([seed & _MASK63 for seed in seeds], dtype=torch.long)


def keyed_uniform(seed_B: Tensor, position: Tensor | int) -> Tensor:
    """Uniform numbers in (0, 1), a pure function of (seed, position): SplitMix64 (Steele et al., 2014). float64

    The two are broadcast against each other: seeds [B, 1] and positions [T] give [B, T].
    """
    x = seed_B + _mul(torch.as_tensor(position) + 1, 0x9E3779B97F4A7C15)
    for _ in range(2):  # neighbouring seeds and positions differ in few bits: mix twice
        x = _mul(x ^ _shift(x, 30), 0xBF58476D1CE4E5B9)
        x = _mul(x ^ _shift(x, 27), 0x94D049BB133111EB)
        x = x ^ _shift(x, 31)
    return (_shift(x, 11).double() + 0.5) / (1 << 53)


def _mul(x: Tensor, factor: int) -> Tensor:
    """int64 product modulo 2^64, factor given as unsigned."""
    return x * (factor - (1 << 64) if factor >= 1 << 63 else factor)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
