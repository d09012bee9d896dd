"""Which device a run computes on, and in which precision."""

from __future__ import annotations

import gc
import resource
import sys
from dataclasses import dataclass

import torch

from rlhf_ray.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    device: str  # cuda, mps or cpu
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}"


def choose_hardware(
    device: str = "auto", dtype: str = "auto", *, cuda: bool | None = None, mps: bool | None = None
) -> Hardware:
    """`auto` is cuda, then mps, then cpu; and bfloat16 on CUDA, float32 elsewhere.

    Args:
        cuda, mps: whether there is one; asked of torch when None (tests and cluster drivers say it themselves).
    Raises:
        ConfigError: a device that was asked for by name and is not there, or bfloat16 on MPS.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    mps = torch.backends.mps.is_available() if mps is None else mps
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if device == "cuda" and not cuda:
        raise ConfigError(
            "device=cuda: torch sees no CUDA device; check the driver, install a CUDA build of torch, or set device=cpu"
        )
    if device == "mps" and not mps:
        raise ConfigError("device=mps: torch sees no Apple GPU; set device=auto")
    if dtype == "bfloat16" and device == "mps":
        raise ConfigError(
            "dtype=bfloat16 on MPS loses log-probabilities to rounding and is slower there; set dtype=float32 or auto"
        )
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return Hardware(device, getattr(torch, dtype))


def with_index(device: torch.device) -> torch.device:
    """`cuda` as the very GPU that it stands for: `torch.cuda.set_device` takes no other."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def release_memory() -> None:
    """Give back what is cached and not in use, for other processes on the same GPU."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held so far, in 1e9 bytes: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9
