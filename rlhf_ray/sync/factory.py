"""Chooses the transport."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.sync.buckets import bucket_bytes
from rlhf_ray.sync.cuda_sender import CudaSender
from rlhf_ray.sync.sender import InProcessSender, WeightSender
from rlhf_ray.sync.shared_memory import SharedMemorySender

TRANSPORTS = ("in_process", "shared_memory", "nccl", "cuda_ipc")


def make_sender(
    transport: str,
    *,
    bucket_mb: float = 256.0,
    rank: int = 0,
    receivers: int = 1,
    address: str | None = None,
    directory: Path | None = None,
    device: torch.device | str = "cuda",
    keep: bool = False,
) -> WeightSender:
    """The learner's sender; every learner rank makes one.

    Args:
        bucket_mb: size of one bucket in MiB; a larger tensor travels alone.
        rank: this learner rank; only rank 0 sends.
        receivers: generator workers in all (generators x tensor parallel size), for nccl.
        address: learner rank 0 as the generators reach it, for nccl; found out if None.
        directory: where shared-memory files go; /dev/shm if None.
        device: the learner's GPU, for nccl and cuda_ipc.
        keep: whether what was sent last can be sent again (shared_memory).
    Raises ConfigError for an unknown transport.
    """
    capacity = bucket_bytes(bucket_mb)
    if transport == "in_process":
        return InProcessSender(capacity=capacity, rank=rank)
    if transport == "shared_memory":
        return SharedMemorySender(capacity=capacity, rank=rank, directory=directory, keep=keep)
    if transport in ("nccl", "cuda_ipc"):
        return CudaSender(transport, capacity=capacity, rank=rank, receivers=receivers, address=address, device=device)
    raise ConfigError(f"sync.transport={transport!r} is unknown; choose one of {', '.join(TRANSPORTS)}")
