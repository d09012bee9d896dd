"""The process group in which the ranks of one network talk to each other."""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta

import torch

from rlhf_ray.errors import ConfigError, WorkerError


def join_ranks(
    device: torch.device, rank: int | None, world_size: int | None, address: str | None, port: int | None,
    timeout_s: float,
) -> tuple[int, int]:  # fmt: skip
    """Enter the process group, with a deadline on each of its collectives. Returns (rank, world size)."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed wants it even when the group exists
    if torch.distributed.is_initialized():
        there = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if there != (rank, world_size):
            raise ConfigError(
                f"this process is already rank {there[0]} of {there[1]}, so it cannot be rank {rank} of "
                f"{world_size} for another engine; give both engines the same world size, or own processes"
            )
        return there
    address = address or os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = port if port is not None else int(os.environ.get("MASTER_PORT", "29500"))
    # DeepSpeed reads these even when the group exists.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    began = time.monotonic()
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise WorkerError(
            f"rank {rank} of {world_size} could not meet the others at {address}:{port}, and gave up after "
            f"{time.monotonic() - began:.0f} of {timeout_s:.0f} s ({error}); check that this port is free and that "
            "rank 0 is reachable, also by the interface that Gloo or NCCL takes (GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME in ray.env)"
        ) from error
    # Threads of a group that still stands when the interpreter ends can abort the process after its work is done.
    atexit.register(_leave)
    return rank, world_size


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
