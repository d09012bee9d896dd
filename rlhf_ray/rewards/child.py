"""What runs in the process that `process.Child` starts."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from rlhf_ray.errors import ConfigError

_LENGTH = struct.Struct(">Q")


def main(descriptor: int) -> None:
    """Make the object that the first message names, then answer one call after the other until the parent is gone."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is reported, not written to disk
    with socket.socket(fileno=descriptor) as connection:
        threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
        made: list[Callable[[Any], Any]] = []
        _send(connection, _answer(lambda: made.append(_make(*pickle.loads(_receive(connection))))))
        while made:
            _send(connection, _answer(lambda: made[0](pickle.loads(_receive(connection)))))


def _make(maker: str, args: dict[str, Any]) -> Callable[[Any], Any]:
    module, _, name = maker.partition(":")
    return getattr(importlib.import_module(module), name)(**args)


def _answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except Exception as error:  # the parent raises it, under a name that it knows
        config = isinstance(error, ConfigError)
        return {"config": config, "error": str(error) if config else f"{type(error).__name__}: {error}"}


def _end_with_parent(connection: socket.socket) -> None:
    """Also in the middle of a call that never returns."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else select.POLLHUP)
    poll.poll()
    _end()


def _end() -> None:
    """The parent is gone, or wants no more of us, nor of what the object has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    return _read(connection, length)


def _read(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = connection.recv(min(count - len(received), 1 << 20))
        if not chunk:
            _end()
        received += chunk
    return bytes(received)


def _send(connection: socket.socket, answer: Any) -> None:
    body = json.dumps(answer).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)
