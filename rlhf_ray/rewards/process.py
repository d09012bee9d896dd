"""A child process that may be killed: for whatever may hang, crash or call `os._exit`.

A fresh interpreter, not a fork: a fork of a process that holds threads, CUDA or Ray is not usable. The child ends
with its parent, however that ends: its only socket closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import ConfigError, RewardError

# Importing the user's module may mean loading a model.
START_SECONDS = 300.0

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rlhf_ray.rewards.child import main; main(int(sys.argv[2]))"
)
_LENGTH = struct.Struct(">Q")


class ChildLost(RewardError):
    """The child died, or was killed because it took too long; the message reads on after "reward x"."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Child:
    """Calls an object that lives in a process of its own, one call at a time; a lost child is replaced at the next.

    Args:
        maker: `module:function` that makes the object, a callable, inside the child.
        args: its keyword arguments; they and what is sent are pickled, what comes back is JSON.
    """

    def __init__(self, maker: str, args: Mapping[str, Any]) -> None:
        self._maker, self._args = maker, dict(args)
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._finalizer: weakref.finalize | None = None

    def start(self) -> None:
        """Make the object now. Raises ConfigError or RewardError if its maker does."""
        with self._lock:
            self._start()

    def call(self, payload: Any, timeout_s: float) -> Any:
        """Raises ChildLost if no answer comes in time or the process dies; what the object raises as RewardError."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._exchange(payload, timeout_s)

    def interrupt(self) -> None:
        """Make a call that another thread is waiting for raise ChildLost now."""
        if (pid := self.pid) is not None:
            _kill_group(pid)

    def close(self) -> None:
        """End the process and all that it has started."""
        with self._lock:
            self._kill()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def _start(self) -> None:
        self._kill()
        ours, theirs = socket.socketpair()
        with theirs:
            path = [entry if entry else os.getcwd() for entry in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._socket = ours
        self._finalizer = weakref.finalize(self, _kill, self._process, ours)
        try:
            self._exchange((self._maker, self._args), START_SECONDS)
        except BaseException:
            self._kill()
            raise

    def _exchange(self, payload: Any, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            body = pickle.dumps(payload)
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
            (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
            answer = json.loads(self._receive(length, deadline))
        except TimeoutError:
            self._kill()
            raise ChildLost(
                f"did not return within {timeout_s:g} s, and its process was killed", timed_out=True
            ) from None
        except (EOFError, OSError):
            raise ChildLost(f"lost its process, which {self._how_it_ended()}") from None
        if "error" in answer:
            raise (ConfigError if answer["config"] else RewardError)(answer["error"])
        return answer["value"]

    def _receive(self, count: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # In slices: a dead child's own children may hold the socket open, and no end would ever be read.
            self._socket.settimeout(min(left, 0.5))
            try:
                chunk = self._socket.recv(min(count - len(received), 1 << 20))
            except TimeoutError:
                if self._process.poll() is not None:
                    raise EOFError from None
                continue
            if not chunk:
                raise EOFError
            received += chunk
        return bytes(received)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        self._kill()
        if code is None:
            return "closed its connection"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _kill(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._socket = self._finalizer = None


def _kill(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    _kill_group(process.pid)
    process.wait()


def _kill_group(pid: int) -> None:
    """The whole group: what the function has started goes with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
