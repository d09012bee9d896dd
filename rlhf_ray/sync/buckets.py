"""Buckets: many tensors in one flat byte buffer, so that a sync is a few calls, not one a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.errors import ConfigError

# Views of any dtype must start at a multiple of their item size; a cache line also keeps copies fast.
ALIGNMENT = 64


def bucket_bytes(bucket_mb: float) -> int:
    """Bytes of a bucket of `bucket_mb` MiB. Raises ConfigError unless it is positive."""
    if not math.isfinite(bucket_mb) or bucket_mb <= 0:
        raise ConfigError(f"sync.bucket_mb={bucket_mb} holds no tensor; set it to a positive size such as 256")
    return max(ALIGNMENT, int(bucket_mb * 2**20))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def padded_bytes(tensor: Tensor) -> int:
    """Room that a tensor takes in a bucket."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


@dataclass
class BucketLayout:
    """Where each tensor lies in a bucket; parallel lists, as in vLLM's own update messages."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    nbytes: int = 0  # bytes in use, padding included

    def takes(self, tensor: Tensor, capacity: int) -> bool:
        """Whether the tensor still fits. An empty bucket takes any tensor, however large."""
        return not self.names or self.nbytes + padded_bytes(tensor) <= capacity

    def append(self, name: str, tensor: Tensor) -> int:
        """Reserve room; returns the tensor's offset in bytes."""
        offset = self.nbytes
        self.names.append(name)
        self.dtype_names.append(dtype_name(tensor.dtype))
        self.shapes.append(list(tensor.shape))
        self.offsets.append(offset)
        self.nbytes += padded_bytes(tensor)
        return offset

    def message(self) -> dict[str, Any]:
        """Plain lists and numbers, fit for any remote call."""
        return {
            "names": self.names,
            "dtype_names": self.dtype_names,
            "shapes": self.shapes,
            "offsets": self.offsets,
            "nbytes": self.nbytes,
        }


def write(flat: Tensor, offset: int, tensor: Tensor) -> None:
    """Copy a tensor's bytes into `flat` ([N] uint8, any device) at `offset`."""
    count = tensor.numel() * tensor.element_size()
    if count:
        target = flat[offset : offset + count].view(tensor.dtype).view(tensor.shape)
        target.copy_(tensor.detach())  # strided and accelerator tensors become plain bytes here


def read(
    flat: Tensor, names: list[str], dtype_names: list[str], shapes: list[list[int]], offsets: list[int]
) -> list[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a bucket, as views of `flat`."""
    pairs = []
    for name, dtype, shape, offset in zip(names, dtype_names, shapes, offsets, strict=True):
        kind = dtype_of(dtype)
        count = math.prod(shape) * kind.itemsize
        pairs.append((name, flat[offset : offset + count].view(kind).view(shape)))
    return pairs
