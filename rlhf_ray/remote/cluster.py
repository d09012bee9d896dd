"""The Ray cluster of a run: an existing one, or one of its own that ends with it."""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.models.library_logs import SETTINGS, quiet, wanted
from rlhf_ray.models.threads import WAITING, wait_briefly
from rlhf_ray.remote.loading import Note, silent

PROBE_S = 10.0
CONNECT_S = 90.0
SHM = "/dev/shm"
HTTP2_SETTINGS = b"\x04"  # a frame's type, its fourth byte
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00" + HTTP2_SETTINGS + b"\x00" * 5


@contextmanager
def connected(address: str | None, cpus: float, seconds: float = CONNECT_S, note: Note = silent) -> Iterator[bool]:
    """Ray is there inside. Only what was started here is shut down. Yields whether machines may still join it.

    Args:
        address: ray.address; if None, $RAY_ADDRESS, and without that a cluster on this machine. A process that is
            connected already stays as it is.
        cpus: what the run asks for. A cluster of our own has at least so many: on a laptop the shares are nominal.
        seconds: ray.start_deadline_s. More than CONNECT_S are never waited: a healthy Ray takes a tenth.
        note: hears what is being started or joined, and how long it took.
    Raises:
        PlacementError: nobody answers at the address, or Ray does not start.
    """
    if ray.is_initialized():
        yield False
        return
    setting = "ray.address" if address else "$RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    seconds, began = min(seconds, CONNECT_S), time.monotonic()
    if address == "local":
        note("starting Ray on this machine")
        # Ray's agents look for a head that was killed with this process for a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
        # "local", not None: None would join whatever cluster was last started on this machine.
        settings = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        over = _init(settings | {"address": "local"}, seconds, _not_started)
    else:
        note(f"joining the Ray cluster at {address}")
        require_reachable(address, setting)
        over = _init({"address": address}, seconds, lambda why: _not_joined(f"{setting}={address}", why))
    try:
        machines = sum(node["Alive"] for node in ray.nodes())
        has = ray.cluster_resources()
        note(
            f"Ray is ready in {time.monotonic() - began:.0f} s: {machines} machine{'s' * (machines != 1)}, "
            f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
        )
        yield address != "local"
    finally:
        ray.shutdown()
        over.set()


def _init(settings: dict[str, Any], seconds: float, refusal: Callable[[str], str]) -> threading.Event:
    """`ray.init` in a thread of its own: what hangs in there cannot be interrupted, and with a dead head it hangs.

    Returns what to set after `ray.shutdown`. The handler of SIGTERM stays as it is.
    """
    handler = signal.getsignal(signal.SIGTERM)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    over = threading.Event()

    def init() -> None:
        try:
            # Of the workers' output too: it lies in the logs of Ray's session.
            ray.init(log_to_driver=wanted(), logging_level="INFO" if wanted() else "ERROR", **settings)
        except BaseException as error:  # also SystemExit, with which Ray answers some failures
            ended.put(error)
        else:
            ended.put(None)
            over.wait()  # the kernel would kill Ray's processes with the thread that has started them

    threading.Thread(target=init, name="ray-init", daemon=True).start()
    try:
        error = ended.get(timeout=seconds)
    except queue.Empty:
        raise PlacementError(refusal(f"no answer within {seconds:.0f} s")) from None
    finally:
        # Ray's C++ has set one of its own, unseen by Python, that aborts the process: the run may have last words.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if error is not None:
        raise PlacementError(refusal(" ".join(f"{type(error).__name__}: {error}".split())[:300])) from error
    return over


def _not_started(why: str) -> str:
    shm = f", of which {shutil.disk_usage(SHM).free / 2**30:.1f} GiB are free" if os.path.isdir(SHM) else ""
    return (
        f"ray: it did not start on this machine ({why}); look at gcs_server.out and raylet.out in "
        f"/tmp/ray/session_latest/logs, at the room in /tmp and in {SHM}{shm} (a container gets more by "
        "--shm-size=8g), and for what keeps a process from connecting to this machine's own address (a firewall, a "
        "proxy); `rlhf-ray doctor` tries it; or set executor=local, or ray.address to a cluster that runs"
    )


def _not_joined(where: str, why: str) -> str:
    return (
        f"ray: no cluster at {where} ({why}); look at `ray status` on its head, whose GCS may be dead though other "
        "processes of Ray are left (`ray stop --force`, then `ray start --head`), or leave ray.address and "
        "$RAY_ADDRESS empty to have one started for the run; Ray must be the same version everywhere, and a head that "
        "asks for a token (`ray start` says so) needs RAY_AUTH_MODE=token and the token here, too"
    )


def gpus_of_cluster(address: str | None, seconds: float = CONNECT_S, note: Note = silent) -> int | None:
    """GPUs of the cluster that the run will join; None if it will start one here, with this machine's own.

    `note` hears that the cluster is asked.

    A driver often sits on a head node without any: its own devices say nothing of the workers'.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized() and address in (None, "local"):
        return None
    if not ray.is_initialized():
        note(f"asking the Ray cluster at {address} for its GPUs")
    with connected(address, 0, seconds):
        return int(ray.cluster_resources().get("GPU", 0))


def accelerator_name() -> str | None:
    """The kind of GPU that the connected cluster has, as Ray names it (`H100`); None if there are several or none."""
    prefix = "accelerator_type:"
    kinds = {name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)}
    return kinds.pop() if len(kinds) == 1 else None


def require_reachable(address: str, setting: str = "ray.address") -> None:
    """Raises PlacementError if nothing listens at host:port: Ray itself would try for a long time.

    `setting`: where the address was given.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"{setting}={address}: the run must be inside the cluster, not behind Ray Client; "
            "submit it with `ray job submit`, or give the head's host:port"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{setting}={address} is not host:port, `auto` or `local`")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_S) as head:
            # Ray would ask whatever listens here for minutes. A head speaks HTTP/2: it answers a greeting at once.
            if not os.environ.get("RAY_USE_TLS"):
                head.sendall(HTTP2_GREETING)
                if head.recv(9)[3:4] != HTTP2_SETTINGS:
                    raise OSError("what listens there is not a Ray head")
    except OSError as error:
        raise PlacementError(
            f"ray: nothing answers at {setting}={address} ({error}); check the address, that `ray start --head` "
            "has run there and that no firewall is between, or leave ray.address and $RAY_ADDRESS empty"
        ) from error


def worker_environment(cpus: float, device: str) -> dict[str, str]:
    """What must be in a worker's environment before it imports anything. Never a secret: Ray shows it to everybody.

    `cpus`: that the worker reserves.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(cpus)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # As this process waits, and prints: a setting of the user's goes to the workers, on whatever machine they are.
    environment |= {name: value for name in (*WAITING, *SETTINGS) if (value := os.environ.get(name)) is not None}
    wait_briefly(environment)
    quiet(environment)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
