"""The workers of a role that stand alone (reward, reference): a piece of work goes to the one that is free.

Where one is lost, the others work on, and its pieces go to them. `pool.py` decides who gets what.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from rlhf_ray.remote.calls import POLL_S, Call, Deadline, Worker
from rlhf_ray.remote.crew import Crew, GoneError
from rlhf_ray.remote.health import State
from rlhf_ray.remote.pool import Pool

# A replica: one worker, or the ranks that hold one model together.
Replica = Sequence[Worker]
# Begins a piece of work on a replica: a call of each of its workers.
Start = Callable[[Replica], list[Call]]


@dataclass(frozen=True, eq=False)
class Done:
    """A piece that was computed: who did, and of each worker its call and what that returned."""

    replica: Replica
    calls: Sequence[Call]
    values: Sequence[Any]


@dataclass(eq=False)
class Attempt:
    """A piece that a replica has been given."""

    piece: int
    replica: int
    calls: list[Call]
    values: dict[Call, Any] = field(default_factory=dict)

    @property
    def under_way(self) -> list[Call]:
        return [call for call in self.calls if call not in self.values]


class Replicas:
    """
    Args:
        replicas: each is one worker, or the ranks that hold a model together.
        deadline: of a call.
    """

    def __init__(self, crew: Crew, replicas: Sequence[Replica], deadline: Deadline) -> None:
        self.crew, self.replicas, self.deadline = crew, list(replicas), deadline
        self.pool: Pool[int] = Pool(len(self.replicas))
        self._changed = Condition()  # also the lock of all that follows
        self._numbers = itertools.count()
        self._starts: dict[int, Start] = {}
        self._attempts: dict[int, Attempt] = {}  # by piece
        self._gone: dict[int, Call] = {}  # of each replica that was lost, a call that was lost with it
        self._late: set[int] = set()
        self._refused: dict[int, Exception] = {}  # by piece: what could not even be sent

    def compute(self, starts: Sequence[Start]) -> list[Done]:
        """The results of these pieces, in order; from any thread. The first error of the work itself raises, and so
        does the second time that a piece is late."""
        pieces = [next(self._numbers) for _ in starts]
        found: dict[int, Done] = {}
        with self._changed:
            self._starts.update(zip(pieces, starts, strict=True))
            self.pool.add(pieces)
        try:
            while len(found) < len(pieces):
                calls = self._under_way(pieces)
                if not calls:
                    self.crew.check()
                    continue
                try:
                    call, value = self.crew.next_done(calls)
                except GoneError as error:
                    self._lose(error)
                else:
                    self._take(call, value, found)
        finally:
            with self._changed:
                for piece in pieces:
                    self._forget(piece)
                self._changed.notify_all()
        return [found[piece] for piece in pieces]

    def _under_way(self, pieces: Sequence[int]) -> list[Call]:
        """Sends what can be sent, of everybody's pieces; of these ones the calls that have not ended. If there are
        none, for others have all replicas or all are lost, it waits a moment."""
        with self._changed:
            self._rejoin()
            assigned = self.pool.assign([number for number in self.pool.open if self._is_healthy(number)])
            for number, piece in assigned:
                self._start(number, piece)
            if assigned:
                self._changed.notify_all()
            for piece in pieces:
                if piece in self._refused:
                    raise self._refused[piece]
            calls = [call for piece in pieces if piece in self._attempts for call in self._attempts[piece].under_way]
            if not calls:
                self._changed.wait(POLL_S)
            return calls

    def _start(self, number: int, piece: int) -> None:
        try:
            calls = self._starts[piece](self.replicas[number])
        except Exception as error:  # whatever it is, it belongs to who wants this piece, and that may be another thread
            self._refused[piece] = error
            self.pool.ended(piece)
            return
        for call in calls:
            call.elsewhere = True
        self._attempts[piece] = Attempt(piece, number, calls)

    def _is_healthy(self, number: int) -> bool:
        return all(self.crew.state(worker) is State.HEALTHY for worker in self.replicas[number])

    def _rejoin(self) -> None:
        """Whose place another process has taken, or who answers again, gets work again."""
        for number, call in list(self._gone.items()):
            if self.crew.supervisor.ready(call) and self._is_healthy(number):
                del self._gone[number]
                self.pool.joined(number)

    def _take(self, call: Call, value: Any, found: dict[int, Done]) -> None:
        with self._changed:
            attempt = self._attempt_of(call)
            if attempt is None:
                return  # lost meanwhile with another call of the same replica: it has gone to another
            attempt.values[call] = value
            if attempt.under_way:
                return
            values = [attempt.values[call] for call in attempt.calls]
            found[attempt.piece] = Done(self.replicas[attempt.replica], attempt.calls, values)
            self._forget(attempt.piece)
            for behind in self.pool.open.get(attempt.replica, ()):
                for waiting in self._attempts[behind].calls:
                    waiting.renew()
            self._changed.notify_all()

    def _lose(self, error: GoneError) -> None:
        with self._changed:
            attempt = self._attempt_of(error.call)
            if attempt is None:
                return
            self._gone[attempt.replica] = error.call
            for piece in self.pool.lost(attempt.replica):
                del self._attempts[piece]
            if error.call.late:  # not that process was stuck, if it is late elsewhere, too: the work is too much
                if attempt.piece in self._late:
                    raise error.__cause__
                self._late.add(attempt.piece)
            self._changed.notify_all()

    def _attempt_of(self, call: Call) -> Attempt | None:
        return next((attempt for attempt in self._attempts.values() if call in attempt.calls), None)

    def _forget(self, piece: int) -> None:
        self.pool.ended(piece)
        self._starts.pop(piece, None)
        self._attempts.pop(piece, None)
        self._refused.pop(piece, None)
        self._late.discard(piece)
