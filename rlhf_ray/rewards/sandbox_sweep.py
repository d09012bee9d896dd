"""The processes of a sandboxed program: counted while it runs, and all ended afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

# A bomb may be quicker than one look at the process table.
_SWEEPS = 20


class Watch:
    """On leaving, nothing of the program runs any more.

    Args:
        uid: the program's own user, if it has one: then its processes are those of that user. Otherwise they are its
            process group and those with `marker` in the environment that they were started with.
        own_pids: its processes are in the machine's own process table; else they end with `process`.
    """

    def __init__(
        self, process: subprocess.Popen, most: int, *, uid: int | None, marker: str, own_pids: bool
    ) -> None:
        self.process, self.most, self.uid, self.own_pids = process, most, uid, own_pids
        self.marker = f"RLHF_RAY_SANDBOX={marker}".encode()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        for _ in range(_SWEEPS if self.own_pids else 0):
            left = list(self._left())
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def too_many(self) -> bool:
        """Counted only where the kernel does not: it does for a user of the program's own."""
        return self.own_pids and self.uid is None and sum(1 for _ in self._left()) > self.most

    def _left(self) -> Iterator[int]:
        for pid in _pids():
            if pid != self.process.pid and self._is_its(pid):
                yield pid

    def _is_its(self, pid: int) -> bool:
        try:
            if self.uid is not None:
                return os.stat(f"/proc/{pid}").st_uid == self.uid and not _is_zombie(pid)
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self.marker in file.read()
        except OSError:
            return False  # gone, or somebody else's


def tasks_of(uid: int) -> int:
    """Processes and threads of a user, as RLIMIT_NPROC counts them."""
    count = 0
    for pid in _pids():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except FileNotFoundError:  # not Linux
        return []


def _is_zombie(pid: int) -> bool:
    """Dead, and only waiting for its parent to notice."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"Z"
