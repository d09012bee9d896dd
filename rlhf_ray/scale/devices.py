"""Devices that a plan can be made for: memory, bandwidths, how many lie in one machine. Operations: models/flops.py.

Numbers of the makers' data sheets: memory as the driver shows it (in GiB, less than the name says), bandwidth of that
memory, and of the links inside a machine in one direction (NVLink, Infinity Fabric, or PCIe where there is neither).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.flops import peak_flops

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Attributes:
    name: as models/flops.py knows it.
    memory: bytes.
    bandwidth: of the memory, bytes a second.
    link: between devices of one machine, bytes a second and direction.
    in_a_node: how many lie in one machine.
    """

    name: str
    memory: int
    bandwidth: float
    link: float
    in_a_node: int = 8

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s. Raises ConfigError where the data sheet has no such units."""
        found = _peak(self.name, dtype)
        if found is None:
            raise ConfigError(
                f"{self.name} has no units for {str(dtype).removeprefix('torch.')}; choose another device or dtype"
            )
        return found


_peak = cache(peak_flops)


def _device(name: str, gib: float, gb_s: float, link_gb_s: float, in_a_node: int = 8) -> Device:
    return Device(name, int(gib * GIB), gb_s * 1e9, link_gb_s * 1e9, in_a_node)


DEVICES = {
    "b200": _device("B200", 178.4, 7700, 900),
    "h200": _device("H200", 139.8, 4800, 450),
    "h100": _device("H100", 79.1, 3350, 450),
    "h100-pcie": _device("H100 PCIe", 79.1, 2000, 64),
    "a100": _device("A100", 79.2, 2039, 300),
    "a100-40": _device("A100", 39.4, 1555, 300),
    "l40s": _device("L40S", 44.4, 864, 32),
    "a40": _device("A40", 44.4, 696, 32),
    "a10": _device("A10", 22.1, 600, 32, 4),
    "l4": _device("L4", 22.0, 300, 32),
    "rtx-4090": _device("RTX 4090", 23.6, 1008, 32),
    "rtx-3090": _device("RTX 3090", 23.6, 936, 32),
    "mi300x": _device("MI300X", 191.7, 5300, 64),
}


def find_device(name: str) -> Device:
    """Raises ConfigError for a name that is not in the table."""
    key = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").removeprefix("amd-")
    if key in DEVICES:
        return DEVICES[key]
    near = difflib.get_close_matches(key, DEVICES, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f"--device {name}: no such device is known{meant}; choose one of {', '.join(DEVICES)}, and for another one the "
        "nearest of them, with its own numbers in --memory and --rates"
    )
