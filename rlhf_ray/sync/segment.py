"""Files in shared memory that one process writes and others map.

Plain files instead of `multiprocessing.shared_memory`: there, before Python 3.13, a process that only
attached unlinks the segment when it exits.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.errors import SyncError

PREFIX = "rlhf_ray-sync-"
# A file younger than this may belong to a process that has not locked it yet.
GRACE_SECONDS = 60.0


def default_directory() -> Path:
    """Memory-backed where the system has it, else the temporary directory (slower, but correct)."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


class Segment:
    """A shared buffer that this process owns: `flat` is its [N] uint8 view, `path` what others open.

    Args:
        nameless: where the system can open files of other processes, it has no name (a process that is killed leaves
            nothing behind), and can be opened as long as this process holds it; elsewhere as long as it has its name.
    """

    def __init__(self, nbytes: int, directory: Path, *, nameless: bool = False) -> None:
        self.nbytes = nbytes
        handle, name = tempfile.mkstemp(prefix=f"{PREFIX}{os.getpid()}-", dir=directory)
        self.path = Path(name)
        self._cleanup = weakref.finalize(self, _remove, handle, name, os.getpid())
        try:
            # Held as long as this process lives: that is how others tell a leftover from a live file.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _reserve(handle, nbytes)
            self.flat = _map(handle, nbytes)
        except OSError as error:
            self._cleanup()
            raise SyncError(
                f"weight sync: cannot reserve {nbytes / 2**20:.0f} MiB in {directory} ({error.strerror}; "
                f"{free_bytes(directory) / 2**20:.0f} MiB free); make it larger (docker --shm-size, a memory "
                "emptyDir on /dev/shm in Kubernetes), lower sync.bucket_mb, set ray.restarts=0 (no copy of the weights "
                "is kept for generators that take the place of a lost one), or use another sync.transport"
            ) from error
        if nameless and Path("/proc/self/fd").is_dir():
            self.path.unlink()
            self.path = Path(f"/proc/{os.getpid()}/fd/{handle}")

    def close(self) -> None:
        """Unlink the file. Processes that have mapped it, this one too, keep their mapping."""
        self._cleanup()


class AttachedSegments:
    """Read side: maps files by path and remembers the last few used, also when they are unlinked by then."""

    KEEP = 4

    def __init__(self) -> None:
        self._open: dict[str, tuple[_Identity, Tensor]] = {}

    def flat(self, path: str, nbytes: int) -> Tensor:
        """[N >= nbytes] uint8 view of the file. Raises SyncError if it is not there or too short."""
        there, (known, flat) = _identity(path), self._open.pop(path, (None, None))
        if flat is None or there not in (None, known):  # another file has taken the path of the one before
            flat = attach(path, nbytes)
            there = _identity(path)
        self._open[path] = there or known, flat
        while len(self._open) > self.KEEP:
            del self._open[next(iter(self._open))]
        return flat

    def close(self) -> None:
        self._open.clear()


_Identity = tuple[int, int] | None


def _identity(path: str) -> _Identity:
    """Of the file that is there now; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def attach(path: str, nbytes: int) -> Tensor:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:
        raise SyncError(
            f"weight sync: the learner's segment {path} cannot be opened here ({error.strerror}); shared_memory "
            "needs learner and generators on one host with one /dev/shm; place them together or set "
            "sync.transport=nccl (if they are: this generator is newer than the learner's handshake, which "
            "WeightSender.reset repeats)"
        ) from error
    try:
        size = os.fstat(handle).st_size
        if size < nbytes:
            raise SyncError(
                f"weight sync: {path} holds {size} bytes where {nbytes} were announced: the sender was cut off; "
                "replace this generator and sync again"
            )
        return _map(handle, size)
    finally:
        os.close(handle)


def remove_leftovers(directory: Path) -> list[Path]:
    """Unlink segments whose owner is dead (killed before it could clean up); returns them."""
    removed = []
    for path in directory.glob(f"{PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime < GRACE_SECONDS:
                continue
            handle = os.open(path, os.O_RDWR)
        except OSError:  # another user's, or just gone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(handle)
    return removed


def free_bytes(directory: Path) -> int:
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def _reserve(handle: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        # A merely truncated file would be filled later, and a full /dev/shm then kills the process with
        # SIGBUS.
        os.posix_fallocate(handle, 0, nbytes)
    else:
        os.ftruncate(handle, nbytes)


def _map(handle: int, nbytes: int) -> Tensor:
    memory = mmap.mmap(handle, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(memory, dtype=torch.uint8)


def _remove(handle: int, name: str, owner: int) -> None:
    os.close(handle)
    if os.getpid() == owner:  # a forked child must not unlink its parent's segment
        Path(name).unlink(missing_ok=True)
