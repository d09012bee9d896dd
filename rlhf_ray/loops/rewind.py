"""Ranks that learn are lost in mid-run: others take their seats, and the run goes back to its newest checkpoint.

What follows is what `--resume auto` does, in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from rlhf_ray.errors import RanksLostError
from rlhf_ray.run.training_run import TrainingRun

Result = TypeVar("Result")


def through_losses(
    attempt: Callable[[], Result], run: TrainingRun, rejoin: Callable[[], Mapping[str, float]],
    forget: Callable[[], None] = lambda: None,
) -> Result:  # fmt: skip
    """`attempt()`, which goes on from `run.resume_point`; after a loss again, from the newest checkpoint.

    Args:
        rejoin: waits until other processes sit there; returns the seconds that the loss has cost so far.
        forget: drops what the loop holds of the steps that are left.
    Raises:
        RanksLostError: so many losses in a row, without a new step in between, that it is not chance.
        KeyboardInterrupt: the run was to stop after the step that is lost.
    """
    lost, furthest, in_a_row = False, 0, 0
    while True:
        try:
            if lost:
                forget()
                run.go_back(rejoin())
            return attempt()
        except RanksLostError as error:
            # Whoever ends a job ends its workers, too, and waits neither for others nor for a step.
            run.stop.heed()
            run.stop.go()
            in_a_row = 1 if run.steps_done > furthest else in_a_row + 1
            furthest, most = max(furthest, run.steps_done), run.config.ray.restarts
            if in_a_row > most:
                raise RanksLostError(
                    f"{error}; this was loss number {in_a_row} after step {furthest} and before the next, and "
                    f"ray.restarts={most}: look at what that step needs, then resume with --resume auto"
                ) from None
            lost = True
