"""Time as an argument: whoever measures or waits is given a clock, so that a test runs on a simulated one."""

from __future__ import annotations

from collections.abc import Callable

# Seconds since some moment; it never goes back. `time.monotonic` is one.
Clock = Callable[[], float]
