"""A thread that makes steps before the learner needs them, each with exactly one version of the weights.

Whatever the clock does, a step is written by the version that `version_of` names: the thread waits for it, and new
weights wait until everything that is due to the present ones has been written. So a run repeats itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

# How long a healthy thread may take to notice that it should end.
_STOP_SECONDS = 60.0

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes steps in order and keeps them until they are taken.

    Args:
        make: makes a step. It calls its second argument as soon as the generator is done with it; what comes then
            (rewards) does not keep new weights waiting.
        version_of: the version that a step is written with; it never falls from one step to the next.
        end: the step behind the last one.
    """

    def __init__(
        self, make: Callable[[int, Callable[[], None]], T], version_of: Callable[[int], int], end: int
    ) -> None:
        self._make = make
        self._version_of = version_of
        self._end = end
        self._unwritten = end  # the first step that the generator is not done with
        self._made: dict[int, T] = {}
        self._taken = 0  # the first step that nobody has taken
        self._version: int | None = None
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, version: int, made: Mapping[int, T]) -> None:
        """Begin; the generator holds `version`, which step `version` learns from at the latest. `made`: the steps from
        there on that are ready already."""
        step = version + len(made)
        self._made = dict(made)
        self._taken, self._unwritten, self._version = version, step, version
        self._thread = threading.Thread(target=self._run, args=(step,), name="rollouts", daemon=True)
        self._thread.start()

    def take(self, step: int) -> T:
        """This step, once it is ready. Raises what making it, or one before it, raised."""
        with self._changed:
            self._wait_for(lambda: step in self._made)
            if step not in self._made:
                raise self._error
            self._taken = step + 1
            return self._made.pop(step)

    def due_before(self, version: int) -> dict[int, T]:
        """The steps that older weights than these have written and nobody has taken, once they are ready. After an
        error those that are."""
        with self._changed:
            steps = [s for s in range(self._taken, self._end) if self._version_of(s) < version]
            self._wait_for(lambda: all(step in self._made for step in steps))
            return {step: self._made[step] for step in steps if step in self._made}

    def finish_writing(self) -> None:
        """Wait until all that is due to the present weights is written, or cannot be any more."""
        with self._changed:
            self._wait_for(lambda: not self._due())

    def changed(self, version: int) -> None:
        """The generator now holds `version`."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def close(self) -> bool:
        """Make no more steps. Returns whether the one that was under way has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: condition() or self._error is not None)

    def _due(self) -> bool:
        """Whether there is a step that the present weights write."""
        return (
            self._version is not None
            and self._unwritten < self._end
            and self._version_of(self._unwritten) <= self._version
        )

    def _run(self, start: int) -> None:
        try:
            for step in range(start, self._end):
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._due())
                    if self._stopping:
                        return
                made = self._make(step, lambda step=step: self._written(step))
                with self._changed:
                    self._made[step] = made
                    self._changed.notify_all()
        except BaseException as error:  # the loop must hear of it, whatever it is
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _written(self, step: int) -> None:
        with self._changed:
            self._unwritten = step + 1
            self._changed.notify_all()
