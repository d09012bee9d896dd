"""Where a step's seconds go: `with timer("generate"): ...` -> `{"time/generate": 1.2}`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.clock import Clock


class Timer:
    """Adds up seconds by name, from any thread. Overlapping work may add up to more than the clock's time."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:  # the seconds of a part that failed were spent all the same
            self.add(name, self._clock() - started)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """The metrics `time/<name>` in seconds since the last call; starts again from nothing."""
        with self._lock:
            taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
            self._seconds.clear()
        return taken
