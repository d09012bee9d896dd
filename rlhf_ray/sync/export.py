"""Streams of (Hugging Face name, tensor): what a learner exports and a generator loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NamedTensor = tuple[str, Tensor]
# Called once per sync; every learner rank iterates what it returns to the end, because ZeRO-3 gathers on the
# way.
WeightSource = Callable[[], Iterable[NamedTensor]]


@dataclass(frozen=True)
class ParamMeta:
    """Name, dtype and full shape of one exported tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def describe(pairs: Iterable[NamedTensor]) -> list[ParamMeta]:
    """What a stream holds, without keeping its tensors. Iterates it to the end."""
    return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]
