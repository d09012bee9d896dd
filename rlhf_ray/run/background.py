"""Calls in threads that keep no process from ending: Python waits for those of a ThreadPoolExecutor, also for one that
hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """So many threads, each started when there is work for it; calls begin in the order in which they are submitted.

    `close`, which leaving a `with` block does, cancels what has not begun, and waits for nothing: it may hang.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads, self.name = threads, name
        self._started = 0
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        while True:
            try:
                future, _ = self._waiting.get_nowait()
            except Empty:
                break
            future.cancel()
        for _ in range(self._started):
            self._waiting.put(None)

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.put((future, lambda: call(*args)))
        if self._started < self.threads:
            self._started += 1
            threading.Thread(target=self._run, name=self.name, daemon=True).start()
        return future

    def _run(self) -> None:
        while (next_one := self._waiting.get()) is not None:
            future, call = next_one
            try:
                future.set_result(call())
            except BaseException as error:  # whatever it is, it belongs to who asks for the result
                future.set_exception(error)
