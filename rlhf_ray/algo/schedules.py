"""Numbers that move in a straight line over a run: coefficients, the temperature."""

from __future__ import annotations


def linear(start: float, end: float | None, step: int, steps: int) -> float:
    """`start` at step 0, `end` at the last of `steps` steps and after it; without an `end`, `start` throughout."""
    if end is None or steps < 2:
        return start
    return start + (end - start) * min(step / (steps - 1), 1.0)
