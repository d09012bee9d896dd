"""The state of a seat: what signs of life and the time make of it, and when another process may take it.

    HEALTHY <-> SUSPECT -> DEAD -> RESTARTING -> HEALTHY, or by way of STALE

Only HEALTHY ones get work. A process may die in any state; no edge leads from DEAD to HEALTHY, for what died comes back
only as another process that has loaded everything. Nothing here waits, and the time is given: tests run it on a
simulated clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from rlhf_ray.clock import Clock
from rlhf_ray.config.sections import RayConfig

WINDOW_S = 3600.0
# Before the second restart within a window; doubled before each further one.
BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0


class State(Enum):
    HEALTHY = "healthy"  # only such a one gets work
    SUSPECT = "suspect"  # silent for a while, as after a loss of the network: it is waited for
    DEAD = "dead"  # its process is lost
    RESTARTING = "restarting"  # a process is loading, at the start of the run or in the place of a dead one
    STALE = "stale"  # a generator that has loaded, and not yet been sent the weights that the others hold


EDGES = frozenset({
    (State.RESTARTING, State.STALE), (State.STALE, State.HEALTHY), (State.STALE, State.SUSPECT),
    (State.STALE, State.DEAD), (State.SUSPECT, State.STALE),
    (State.RESTARTING, State.HEALTHY), (State.RESTARTING, State.DEAD), (State.HEALTHY, State.SUSPECT),
    (State.HEALTHY, State.DEAD), (State.SUSPECT, State.HEALTHY), (State.SUSPECT, State.DEAD),
    (State.DEAD, State.RESTARTING),
})  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Seconds between two signs of life; seconds of silence beyond that until one is suspected, and is lost; restarts
    within WINDOW_S; and the seconds that a restart may take."""

    pulse_s: float
    suspect_s: float
    silence_s: float
    restarts: int
    start_s: float

    @staticmethod
    def of(config: RayConfig) -> Limits:
        return Limits(
            config.pulse_s, config.silence_s / 3, config.silence_s, config.restarts, config.start_deadline_s
        )  # fmt: skip


class Health:
    """One seat, from the moment that its first process begins to load."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self._state = State.RESTARTING
        self._heard = clock()
        self._load_until = math.inf  # the first start has a deadline of its own
        self._before = State.HEALTHY  # it was suspected
        self._died = 0.0
        self._restarts: list[float] = []  # when, those within the window

    @property
    def state(self) -> State:
        return self._state

    @property
    def silent(self) -> float:
        """Seconds since the last sign of life."""
        return self.clock() - self._heard

    @property
    def restarts(self) -> int:
        """Within the last WINDOW_S."""
        self._restarts = [at for at in self._restarts if self.clock() - at < WINDOW_S]
        return len(self._restarts)

    def heard(self) -> None:
        """A sign of life of the seat's process."""
        self._heard = self.clock()
        if self._state is State.SUSPECT:
            self._to(self._before)

    def excuse(self) -> None:
        """Its machine was cut off, and is there again: its silence counts as if the suspicion had just begun."""
        self._heard = max(self._heard, self.clock() - self.limits.pulse_s - self.limits.suspect_s)

    def overlook(self, seconds: float) -> None:
        """In these nobody listened: they are no silence."""
        self._heard = min(self.clock(), self._heard + seconds)

    def doubt(self) -> None:
        """It could not be reached."""
        if self._state in (State.HEALTHY, State.STALE):
            self._before = self._state
            self._to(State.SUSPECT)

    def look(self, patience: float = 1.0) -> State:
        """What has become of it in the meantime. `patience`: that many times as long a silence is no loss yet."""
        if self.silent > self.limits.pulse_s + self.limits.suspect_s:
            self.doubt()
        if self._state is State.SUSPECT and self.silent > self.limits.pulse_s + patience * self.limits.silence_s:
            self.lose()
        if self._state is State.RESTARTING and self.clock() > self._load_until:
            self.lose()
        return self._state

    def lose(self) -> None:
        """Its process has died, or will be ended."""
        self._to(State.DEAD)
        self._died = self.clock()

    @property
    def starting_s(self) -> float:
        """Seconds since the last restart; 0 where there was none."""
        return self.clock() - self._restarts[-1] if self._restarts else 0.0

    @property
    def spent(self) -> bool:
        """Whether the budget of restarts is used up."""
        return self.restarts >= self.limits.restarts

    @property
    def due(self) -> bool:
        """Whether another process may take the seat now."""
        before = self.restarts
        wait = 0.0 if not before else min(BACK_OFF_S * 2 ** (before - 1), LONGEST_BACK_OFF_S)
        return self._state is State.DEAD and not self.spent and self.clock() >= self._died + wait

    def restart(self) -> None:
        """Another process takes the seat, and begins to load."""
        self._to(State.RESTARTING)
        self._restarts.append(self.clock())
        self._load_until = self.clock() + self.limits.start_s

    def loaded(self, *, stale: bool = False) -> None:
        """The process can do the seat's work; `stale`: once it has been sent weights."""
        self._to(State.STALE if stale else State.HEALTHY)
        self._heard = self.clock()

    def synced(self) -> None:
        """It has been sent the weights that the others hold."""
        self._to(State.HEALTHY)

    def _to(self, state: State) -> None:
        if (self._state, state) not in EDGES:
            raise AssertionError(f"no way leads from {self._state.value} to {state.value}")
        self._state = state
