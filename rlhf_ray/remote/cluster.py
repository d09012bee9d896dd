"""The Ray cluster of a run: an existing one, or one of its own that ends with it."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.threads import WAITING, wait_briefly

PROBE_S = 10.0
HTTP2_SETTINGS = b"\x04"  # a frame's type, its fourth byte
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00" + HTTP2_SETTINGS + b"\x00" * 5


@contextmanager
def connected(address: str | None, cpus: float) -> Iterator[None]:
    """Ray is there inside. Only what was started here is shut down.

    Args:
        address: ray.address; if None, $RAY_ADDRESS, and without that a cluster on this machine. A process that is
            connected already stays as it is.
        cpus: what the run asks for. A cluster of our own has at least so many: on a laptop the shares are nominal.
    Raises:
        PlacementError: nobody answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        with _handler_of_sigterm_kept():
            if address == "local":
                # "local", not None: None would join whatever cluster was last started on this machine.
                ray.init(
                    address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                    num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                )  # fmt: skip
            else:
                require_reachable(address)
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if isinstance(error, PlacementError | ConfigError):
            raise
        raise PlacementError(
            f"ray: no cluster at ray.address={address} ({' '.join(str(error).split())[:300]}); start one with "
            "`ray start --head`, or leave ray.address and $RAY_ADDRESS empty to have one started for the run; a "
            "head that asks for a token (`ray start` says so) needs RAY_AUTH_MODE=token and the token here, too"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _handler_of_sigterm_kept() -> Iterator[None]:
    """Ray's own prints a stack and aborts the process after 3 s, though the run may be writing its last words."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def gpus_of_cluster(address: str | None) -> int | None:
    """GPUs of the cluster that the run will join; None if it will start one here, with this machine's own.

    A driver often sits on a head node without any: its own devices say nothing of the workers'.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized() and address in (None, "local"):
        return None
    with connected(address, cpus=0):
        return int(ray.cluster_resources().get("GPU", 0))


def accelerator_name() -> str | None:
    """The kind of GPU that the connected cluster has, as Ray names it (`H100`); None if there are several or none."""
    prefix = "accelerator_type:"
    kinds = {name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)}
    return kinds.pop() if len(kinds) == 1 else None


def require_reachable(address: str) -> None:
    """Raises PlacementError if nothing listens at host:port: Ray itself would try for a long time."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"ray.address={address}: the run must be inside the cluster, not behind Ray Client; "
            "submit it with `ray job submit`, or give the head's host:port"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"ray.address={address} is not host:port, `auto` or `local`")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_S) as head:
            # Ray would ask whatever listens here for minutes. A head speaks HTTP/2: it answers a greeting at once.
            if not os.environ.get("RAY_USE_TLS"):
                head.sendall(HTTP2_GREETING)
                if head.recv(9)[3:4] != HTTP2_SETTINGS:
                    raise OSError("what listens there is not a Ray head")
    except OSError as error:
        raise PlacementError(
            f"ray: nothing answers at ray.address={address} ({error}); check the address, that `ray start --head` "
            "has run there and that no firewall is between, or leave ray.address and $RAY_ADDRESS empty"
        ) from error


def worker_environment(config: RunConfig, device: str) -> dict[str, str]:
    """What must be in a worker's environment before it imports anything. Never a secret: Ray shows it to everybody."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(config.ray.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # As this process waits: a setting of the user's goes to the workers, on whatever machine they are.
    environment |= {name: value for name in WAITING if (value := os.environ.get(name)) is not None}
    wait_briefly(environment)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
