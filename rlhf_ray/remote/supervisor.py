"""Watches the processes of a run and gives a lost one's seat to another, as far as its role allows it.

Decisions only: `World` does what they say, with Ray (`remote/processes.py`) or in a test that simulates it. One thread
calls `step` over and over; others read `lost` and `ready`, and send in what they saw.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from rlhf_ray.clock import Clock
from rlhf_ray.errors import DeadlineError, RlhfRayError
from rlhf_ray.remote.calls import Call, Worker, death, reason_of, silence
from rlhf_ray.remote.failures import CutError
from rlhf_ray.remote.health import Health, Limits, State

# How long the cause of an error may take to show: a rank hears "connection closed" before Ray reports the death.
CAUSE_S = 5.0

# A link that was cut for some seconds may be silent for as long again: TCP doubles the time between its attempts. Of a
# machine that is gone Ray says so itself.
CUT_PATIENCE = 2.0

# (kind of event, worker, a sentence for people)
Tell = Callable[[str, str, str], None]


def untold(kind: str, worker: str, text: str) -> None:
    """The `tell` of those who do not want to know."""


@dataclass(frozen=True)
class Sign:
    """What has come of the process in a seat."""

    name: str
    kind: Literal["alive", "out of reach", "died", "loaded"]
    error: BaseException | None = None


class World(Protocol):
    """The processes in the seats."""

    def feel(self, name: str) -> None:
        """Ask for a sign of life."""

    def wait(self, seconds: float) -> list[Sign]:
        """Signs of the processes that sit there now; [] if there are none within `seconds`. Who was out of reach is
        asked again by itself."""

    def restart(self, names: Sequence[str]) -> None:
        """Begin to load other processes for these seats, which live and die together: each will be `loaded`, or
        `died`."""

    def end(self, name: str) -> None:
        """End the seat's process, also one that is still loading; no more signs come of it."""

    def who(self, name: str) -> Worker:
        """The seat with the process that is or was last there, for messages; it does not change any more."""


@dataclass(frozen=True)
class Loss:
    """A seat that stays empty, who was the last to sit there, and the error to raise, given what the run was doing."""

    name: str
    who: str
    error: Callable[[str], RlhfRayError]


@dataclass(frozen=True)
class Setback:
    """Seats that are being taken by others; a setback of the run, where these held what only a checkpoint has now.

    Attributes:
        what: was lost first, in words.
        detect_s: seconds from its last sign of life until it was known; a hang takes long, a death at most a pulse.
        at: when it was known.
        start_s: seconds from there until all seats were taken.
    """

    name: str
    what: str
    detect_s: float
    at: float
    start_s: float = 0.0


class Supervisor:
    """
    Args:
        tell: hears of every fault and what was done about it, in the thread that calls `step`.
        here: this process's own machine. One of the others may be cut off.
    """

    def __init__(
        self, world: World, names: Iterable[str], limits: Limits, clock: Clock, tell: Tell = untold,
        here: str | None = None,
    ) -> None:  # fmt: skip
        self.world = world
        self.here = here
        self.limits = limits
        self.clock = clock
        self.tell = tell
        self.seats = {name: Health(limits, clock) for name in names}
        self.replaceable: frozenset[str] = frozenset()
        self.receivers: frozenset[str] = frozenset()
        self.holders: frozenset[str] = frozenset()
        self.lost: Loss | None = None
        self.setback: Setback | None = None
        self.overcome: Setback | None = None  # the one before
        self._groups: dict[str, Sequence[str]] = {}
        self._vacant: dict[Sequence[str], Setback] = {}  # groups that are being taken anew
        self._unexplained: dict[str, tuple[float, Call, RlhfRayError]] = {}  # until when a cause may show
        self._told_waiting: set[str] = set()  # seats whose next process has no machine yet
        self._said: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._looked = clock()
        for name in self.seats:
            world.feel(name)

    # ------------------------------------------------------------ for other threads

    def built(
        self, replaceable: Iterable[str], receivers: Iterable[str] = (), together: Iterable[Sequence[str]] = (),
        holders: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """Everything is loaded: from now on silence counts, and another process may take a seat that is replaceable.

        Args:
            receivers: those of them whose process is stale until it has been sent weights.
            together: groups of them whose processes live and die together.
            holders: those of them whose processes hold what nobody else has. Once one is lost there is a `setback`,
                and its successors are stale, until `rejoin`.
        """
        self._groups = {name: tuple(group) for group in together for name in group}
        self.receivers, self.holders = frozenset(receivers), frozenset(holders)
        # Last: the thread that looks must not replace one alone whose peers and role it does not know yet.
        self.replaceable = frozenset(replaceable)
        self._said.put(self._all_loaded)

    def peers(self, name: str) -> Sequence[str]:
        """All seats that are lost with this one."""
        return self._groups.get(name, (name,))

    def retire(self, names: Iterable[str]) -> None:
        """Nobody takes these seats any more."""
        self.replaceable -= frozenset(names)

    def rejoin(self) -> None:
        """Once all seats of holders are taken anew, their processes get work, and the setback is over."""
        self._said.put(self._rejoin)

    def report(self, call: Call, error: RlhfRayError) -> None:
        """A call of a replaceable seat was lost."""
        self._said.put(partial(self._failed, call, error))

    def ready(self, call: Call) -> bool:
        """Whether a call that was lost may go out again: to another process, or to one that was out of reach."""
        moved = call.process is not call.worker.process
        able = (State.HEALTHY, State.STALE) if call.needs_no_weights else (State.HEALTHY,)
        return self.seats[call.worker.name].state in able and (moved or call.cut_off)

    def synced(self, name: str) -> None:
        """A stale process has been sent the weights that the others hold."""
        self._said.put(partial(self._synced, name, self.world.who(name)))

    # ------------------------------------------------------------ one look

    def step(self, seconds: float) -> None:
        """Wait for signs at most so long, and act on what there is."""
        for sign in self.world.wait(seconds):
            self._hear(sign)
        while not self._said.empty():
            self._said.get()()
        self._overlook_own_pause(seconds)
        for name in self.seats:
            self._look(name)

    def _overlook_own_pause(self, waited: float) -> None:
        """While this process was stopped itself, as with all of a job by its scheduler, it heard nobody."""
        before, self._looked = self._looked, self.clock()
        pause = self._looked - before - waited
        if pause > self.limits.suspect_s:
            for health in self.seats.values():
                health.overlook(pause)

    def _hear(self, sign: Sign) -> None:
        name, health = sign.name, self.seats[sign.name]
        if health.state is State.DEAD:
            return  # one that was given up says something after all
        if sign.kind == "died":
            who, error = self.world.who(name), sign.error or RuntimeError("no reason is known")
            return self._lose(name, f"{who} died: {reason_of(error)}", partial(death, who, error))
        if sign.kind == "loaded":
            health.loaded(stale=name in self.receivers | self.holders)
            self._loaded(name)
        elif sign.kind == "alive":
            suspected, silent = health.state is State.SUSPECT, health.silent
            health.heard()
            if suspected:
                for other in self._on_its_machine(name) if self._is_elsewhere(name) else ():
                    self.seats[other].excuse()
                self.tell("worker_answers", name, f"{self.world.who(name)} answers again, after {silent:.0f} s")
        else:
            return self._doubt(name)
        self.world.feel(name)

    def _look(self, name: str) -> None:
        health = self.seats[name]
        before, silent = health.state, health.silent
        state = health.look(self._patience(name) if before is State.SUSPECT else 1.0)
        if state is State.SUSPECT and before is not State.SUSPECT:
            self._tell_silence(name)
        elif state is State.DEAD and before is State.RESTARTING:
            text = f"{name} did not load within {self.limits.start_s:.0f} s (ray.start_deadline_s)"
            self._vacate(name, text, lambda when: DeadlineError(f"{text}; then resume with --resume auto"))
        elif state is State.DEAD and before is not State.DEAD:
            who = self.world.who(name)
            self._vacate(name, f"{who} gave no sign of life for {silent:.0f} s", partial(silence, who, silent))
        elif state is not State.DEAD and self.clock() >= self._unexplained.get(name, (math.inf,))[0]:
            _, call, error = self._unexplained.pop(name)
            self._lose(name, _first_line(error), lambda when: error)
        elif state is State.RESTARTING and health.starting_s > self.limits.suspect_s and name not in self._told_waiting:
            self._tell_waiting(name)
        elif name in self.replaceable and self._are_due(self.peers(name)):
            for peer in self.peers(name):
                self.seats[peer].restart()
                self._told_waiting.discard(peer)
            self.world.restart(self.peers(name))

    def _is_elsewhere(self, name: str) -> bool:
        return self.here is not None and self.world.who(name).node != self.here

    def _patience(self, name: str) -> float:
        """More, where nobody on its machine says anything."""
        there = [self.seats[other].state for other in self._on_its_machine(name)]
        silent = not any(state in (State.HEALTHY, State.STALE) for state in there)
        return CUT_PATIENCE if silent and self._is_elsewhere(name) else 1.0

    def _on_its_machine(self, name: str) -> list[str]:
        node = self.world.who(name).node
        return [other for other in self.seats if self.world.who(other).node == node]

    def _are_due(self, names: Sequence[str]) -> bool:
        return all(self.seats[name].due for name in names)

    def _loaded(self, name: str) -> None:
        peers = self.peers(name)
        if name in self.receivers or any(self.seats[p].state in (State.RESTARTING, State.DEAD) for p in peers):
            return
        if self.setback is not None and name in self.holders:
            self.setback = replace(self.setback, start_s=self.clock() - self.setback.at)
        self._tell_restarted(name)

    def _rejoin(self) -> None:
        if self.setback is not None and all(self.seats[name].state is State.STALE for name in self.holders):
            for name in self.holders:
                self.seats[name].synced()
            self.overcome, self.setback = self.setback, None

    def _synced(self, name: str, who: Worker) -> None:
        if self.seats[name].state is State.STALE and str(who) == str(self.world.who(name)):
            self.seats[name].synced()
            self._tell_restarted(name)

    def _tell_restarted(self, name: str) -> None:
        peers = self.peers(name)
        if len(peers) == 1:
            text = f"{self.world.who(name)} has taken the place of the one that was lost"
        else:
            text = f"the places are taken again by {', '.join(str(self.world.who(peer)) for peer in peers)}"
        loss = self._vacant.pop(peers)
        seconds = f"it was noticed within {loss.detect_s:.1f} s, and took {self.clock() - loss.at:.1f} s to start"
        self.tell("worker_restarted", loss.name, f"{text}; {seconds}")

    def _doubt(self, name: str) -> None:
        if self.seats[name].state in (State.HEALTHY, State.STALE):
            self.seats[name].doubt()
            self._tell_silence(name)

    def _tell_silence(self, name: str) -> None:
        most = self.limits.pulse_s + self.limits.silence_s
        text = f"{self.world.who(name)} gives no sign of life; it is waited for, up to {most:.0f} s (ray.silence_s)"
        if self._is_elsewhere(name):
            longest = self.limits.pulse_s + CUT_PATIENCE * self.limits.silence_s
            text += f", or {longest:.0f} s where nobody on its machine gives one"
        self.tell("worker_silent", name, text)

    def _tell_waiting(self, name: str) -> None:
        """Its place was on a machine that is lost, and no other has room; or a worker's start takes long."""
        if self.world.who(name).pid:
            return  # it runs, and loads
        self._told_waiting.add(name)
        text = (
            f"{name} waits for a machine with room for it, up to {self.limits.start_s:.0f} s (ray.start_deadline_s); "
            "look at `ray status`"
        )
        self.tell("worker_waits", name, text)

    def _failed(self, call: Call, error: RlhfRayError) -> None:
        name = call.worker.name
        if call.process is not call.worker.process:
            return  # of one that has been replaced meanwhile
        if isinstance(error, CutError) and name not in self.holders:
            self._doubt(name)
        elif self.seats[name].state in (State.HEALTHY, State.SUSPECT, State.STALE):
            # Of several it may be only what one has noticed of another's death.
            patience = CAUSE_S if len(self.peers(name)) > 1 else 0.0
            self._unexplained.setdefault(name, (self.clock() + patience, call, error))

    def _all_loaded(self) -> None:
        for health in self.seats.values():
            if health.state is State.RESTARTING:
                health.loaded()

    # ------------------------------------------------------------ a loss

    def _lose(self, name: str, what: str, error: Callable[[str], RlhfRayError]) -> None:
        self.seats[name].lose()
        self._vacate(name, what, error)

    def _vacate(self, name: str, what: str, error: Callable[[str], RlhfRayError]) -> None:
        health, peers = self.seats[name], self.peers(name)
        if name not in self.replaceable:
            self._give_up(name, error)
            return
        loss = self._vacant.setdefault(peers, Setback(name, what, health.silent, self.clock()))
        if name in self.holders and self.setback is None:
            self.setback = loss
        for peer in peers:
            if self.seats[peer].state is not State.DEAD:
                self.seats[peer].lose()
            self._unexplained.pop(peer, None)
            self.world.end(peer)
        self.tell("worker_lost", name, what)
        if health.spent:
            self._give_up(name, partial(self._spent, error, health.restarts))

    def _give_up(self, name: str, error: Callable[[str], RlhfRayError]) -> None:
        self.lost = self.lost or Loss(name, str(self.world.who(name)), error)

    def _spent(self, error: Callable[[str], RlhfRayError], restarts: int, when: str) -> RlhfRayError:
        last = error(when)
        if not restarts:
            return last
        times = "once" if restarts == 1 else f"{restarts} times"
        return type(last)(
            f"{last}; it had been started again {times} within an hour, and ray.restarts={self.limits.restarts}"
        )


def _first_line(error: RlhfRayError) -> str:
    return str(error).partition("\n")[0]
