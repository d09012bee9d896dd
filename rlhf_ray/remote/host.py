"""What every actor of a run is able to do. Light: an actor imports its role's libraries, and no other's."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray

from rlhf_ray.remote.failures import reported
from rlhf_ray.remote.network import use_interface_of


@dataclass(frozen=True)
class Surroundings:
    """What an actor finds, beside what Ray gives it: the command's folder, and variables that Ray does not show."""

    folder: str
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Place:
    """Where an actor found itself."""

    node: str
    pid: int
    port: int  # reserved for this actor, until it says `release_port`
    gpus: tuple[str, ...]


class Host:
    """What every actor answers. Nothing heavy happens before `build`, so that all can start at once."""

    def __init__(self, name: str, around: Surroundings) -> None:
        self.name = name
        # Paths in the config (a reward's file.py, a model folder) are relative to where the command was given.
        with contextlib.suppress(OSError):
            os.chdir(around.folder)
        os.environ.update(around.variables)
        use_interface_of(ray.util.get_node_ip_address())
        # Held until it is used: the next one who asks for any port would get it otherwise.
        self._port = socket.socket()
        self._port.bind(("", 0))

    @reported
    def place(self) -> Place:
        port = int(self._port.getsockname()[1])
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Place(ray.util.get_node_ip_address(), os.getpid(), port, tuple(gpus))

    def release_port(self) -> None:
        self._port.close()

    @ray.method(concurrency_group="watch")
    def pulse(self, seconds: float) -> None:
        """Answers after a while, whatever the role is doing: silence means a dead or stopped process."""
        time.sleep(seconds)

    @reported
    def use_gpus(self, gpus: Sequence[str]) -> None:
        """Share another actor's accelerators (ray.colocate). CUDA reads this once, at its first use."""
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    @reported
    def release_memory(self) -> None:
        """Give unused memory back to the GPU, for the worker that shares it and is about to wake."""
        from rlhf_ray.models.devices import release_memory

        release_memory()

    def shut_down(self) -> None:
        """Free what outlives a killed process (shared memory, child processes)."""
