"""How many floating-point operations a device could do in a second: what a run's `perf/mfu` is a share of."""

from __future__ import annotations

import os
import re
import time
from functools import cache

import torch

# Dense TFLOP/s of matrix products, (bfloat16, float32), from the makers' data sheets. float32 is what PyTorch does
# unasked: without TF32. None: the device has no such units. A name is matched as a whole word, the first that fits.
PEAK_TFLOPS: dict[str, tuple[float | None, float]] = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (None, 15.7),
    "T4": (None, 8.1),
    "MI300X": (1307.4, 163.4),
}
_TRIES = 20


def device_name(device: str) -> str:
    """The maker's name of this process's GPU; `cpu` and `mps` as they are."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device by its name; None where nobody knows.

    There is no data sheet for `cpu` (all cores of this machine) and `mps`: see `measured_flops`.
    """
    if name in ("cpu", "mps"):
        return measured_flops(name, dtype)
    found = next((tflops for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)
    if found is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    peak = found[0] if dtype == torch.bfloat16 else found[1]
    return None if peak is None else peak * 1e12


@cache
def measured_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square matrix products; takes a fraction of a second.

    On a CPU one core's, times the logical cores: while a run starts they are busy, and a product on all of them is as
    slow as the busiest. Where two share a physical core it is more than there is.
    """
    width = 512 if device == "cpu" else 2048
    square = torch.ones(width, width, dtype=dtype, device=device)
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    try:
        for _ in range(_TRIES):
            started = time.perf_counter()
            float((square @ square)[0, 0])  # reading a number waits for the device
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * width**3 / best * (_cores() if device == "cpu" else 1)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on a Mac
        return os.cpu_count() or 1
