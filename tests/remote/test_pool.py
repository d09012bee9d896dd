"""Replicas that share pieces of work: by hand, and over simulated processes that die, hang and are cut off."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import DeadlineError, RlhfRayError
from rlhf_ray.remote import replicas
from rlhf_ray.remote.calls import Deadline, Process, Worker
from rlhf_ray.remote.crew import GoneError
from rlhf_ray.remote.failures import CutError, LostError
from rlhf_ray.remote.health import State
from rlhf_ray.remote.pool import Pool
from rlhf_ray.remote.replicas import Replicas
from rlhf_ray.remote.supervisor import Supervisor
from tests.remote.test_health import LIMITS, SCHEDULES, Simulated, Time, strike

ALL = (0, 1, 2)


def test_a_second_piece_stands_behind_the_first_only_while_many_wait():
    pool = Pool(2)
    pool.add("abcdefg")
    assert pool.assign(ALL) == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
    assert "".join(pool.waiting) == "efg"
    pool.ended("b")
    assert pool.assign(ALL) == [(1, "e")]
    pool.ended("a")
    assert pool.assign(ALL) == [], "two wait, and there are two replicas: each has one left to do"
    pool.ended("c")
    assert pool.assign(ALL) == [(0, "f")], "to whoever is free first"


def test_pieces_of_a_lost_replica_go_out_again_before_all_others():
    pool = Pool(3)
    pool.add("abcdefgh")
    pool.assign(ALL)
    assert pool.open == {0: ["a", "d"], 1: ["b", "e"], 2: ["c"]}
    assert pool.lost(0) == ["a", "d"] and "".join(pool.waiting) == "adfgh"
    pool.ended("c")
    assert pool.assign(ALL) == [(2, "a"), (2, "d")]
    pool.joined(0)
    assert pool.assign([1, 2]) == [], "it may not get work yet"
    assert pool.assign(ALL) == [(0, "f")]


def test_a_piece_that_nobody_wants_any_more_is_forgotten_wherever_it_is():
    pool = Pool(1)
    pool.add("ab")
    pool.assign(ALL)
    for piece in "ba":
        pool.ended(piece)
    assert not pool.waiting and pool.open == {0: []}
    assert pool.lost(0) == [] == pool.lost(0)


# ------------------------------------------------------------------- over simulated processes


@dataclass(eq=False)
class Asked:
    worker: Worker
    process: Process
    until: float
    value: Any
    elsewhere: bool = False
    late: bool = False
    cut_off: bool = False
    needs_no_weights: bool = False

    def renew(self) -> None:
        """Its deadline is no part of this."""


class SimulatedCrew:
    """What `Crew` does, on simulated time: while a call is waited for, processes are watched."""

    def __init__(self, world: Simulated, supervisor: Supervisor, strikes: int) -> None:
        self.world, self.supervisor, self.strikes = world, supervisor, strikes
        self.sent: list[Asked] = []
        self.losses = 0

    def state(self, worker: Worker) -> State:
        return self.supervisor.seats[worker.name].state

    def check(self) -> None:
        self.supervisor.step(0.5)
        assert self.world.time.now < 20_000, "it never ends"
        if self.strikes and self.world.rng.random() < 0.05:
            self.strikes -= 1
            strike(self.world)
        if self.supervisor.lost is not None:
            raise self.supervisor.lost.error("during the work")

    def next_done(self, calls: list[Asked]) -> tuple[Asked, Any]:
        while True:
            self.check()
            for call in calls:
                if call.process.pid in self.world.dead:
                    raise self.gone(call, LostError("killed"))
                if call.process.pid in self.world.hangs:
                    continue
                if self.world.cut.get(call.worker.name, 0) > self.world.time.now:
                    raise self.gone(call, CutError("cut"))
                if self.world.time.now >= call.until:
                    return call, call.value

    def gone(self, call: Asked, error: LostError) -> GoneError:
        assert call.elsewhere
        self.losses += 1
        call.cut_off = isinstance(error, CutError)
        self.supervisor.report(call, error)
        gone = GoneError(str(error), call)
        gone.__cause__ = error
        return gone

    def send(self, piece: int, replica: list[Worker]) -> list[Asked]:
        """Each process computes one after the other."""
        calls = []
        for rank, worker in enumerate(replica):
            assert self.state(worker) is State.HEALTHY, "only such a one gets work"
            before = [call.until for call in self.sent if call.process is worker.process]
            seconds = self.world.rng.uniform(0.1, 20)
            calls.append(Asked(worker, worker.process, max([self.world.time.now, *before]) + seconds, (piece, rank)))
        self.sent += calls
        return calls


@pytest.mark.parametrize("part", range(10))
def test_any_schedule_of_losses_gives_every_piece_once_and_in_order(part, monkeypatch):
    monkeypatch.setattr(replicas, "POLL_S", 0)  # of real time
    ends, losses = Counter(), 0
    for seed in range(part, SCHEDULES, 10):
        rng, time = random.Random(f"pool {seed}"), Time()
        count, ranks = rng.choice([(1, 1), (2, 1), (3, 1), (2, 2)])
        names = [f"reference {i} rank {j}" for i in range(count) for j in range(ranks)]
        world = Simulated(time, rng, names, rng.choice([0, 0, 0.5]))
        supervisor = Supervisor(world, names, LIMITS, time)
        supervisor.built(names)
        crew = SimulatedCrew(world, supervisor, rng.randrange(6))
        crew.check()
        seats = [world.workers[name] for name in names]
        shared = Replicas(crew, [seats[i : i + ranks] for i in range(0, len(seats), ranks)], Deadline(1, "x"))
        pieces, before = rng.randrange(1, 12), 0
        try:
            for _ in range(2):
                done = shared.compute([partial(crew.send, piece) for piece in range(pieces)])
                assert [piece.values for piece in done] == [[(i, j) for j in range(ranks)] for i in range(pieces)]
                assert all([call.worker for call in piece.calls] == list(piece.replica) for piece in done)
                # Nothing goes out twice unless somebody who had it was lost: each loss costs at most two pieces.
                assert len(crew.sent) - before <= ranks * (pieces + 2 * crew.losses)
                before = len(crew.sent)
                assert not (shared._starts or shared._attempts or shared.pool.waiting)
            ends["computed"] += 1
        except RlhfRayError:
            assert supervisor.lost is not None
            ends["a budget was spent"] += 1
        losses += crew.losses
    assert ends["computed"] > ends["a budget was spent"] and losses > 0


@pytest.mark.parametrize("how", ["dead", "hangs"])
def test_while_one_replica_is_lost_the_others_compute_all(how):
    """What it had goes to them at once, or after its silence; nobody waits for its successor, which never loads."""
    time = Time()
    names = ["reward 0", "reward 1", "reward 2"]
    world = Simulated(time, random.Random(3), names)
    world.restart = lambda name: None
    supervisor = Supervisor(world, names, LIMITS, time)
    supervisor.built(names)
    crew = SimulatedCrew(world, supervisor, 0)
    crew.check()
    shared = Replicas(crew, [[world.workers[name]] for name in names], Deadline(1, "x"))

    def send(piece, replica):
        calls = crew.send(piece, replica)
        getattr(world, how).add(world.workers["reward 0"].pid)
        return calls

    done = shared.compute([partial(send, piece) for piece in range(9)])
    assert [piece.values for piece in done] == [[(i, 0)] for i in range(9)]
    assert Counter(call.worker.name for call in crew.sent)["reward 0"] == 2, "one under way and one behind it"
    assert {call.worker.name for piece in done for call in piece.calls} == {"reward 1", "reward 2"}
    assert supervisor.seats["reward 0"].state is State.RESTARTING


class Late:
    """Every call is late, wherever."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def state(self, worker: Worker) -> State:
        return State.HEALTHY

    def next_done(self, calls: list[Asked]) -> tuple[Asked, Any]:
        calls[0].late = True
        raise GoneError("late", calls[0]) from DeadlineError(f"{calls[0].worker.name} is late")


def test_a_piece_that_is_late_twice_is_too_much_work():
    crew, asked = Late(), []
    workers = [Worker(f"reward {i}", None, pid=i) for i in range(3)]

    def send(replica):
        asked.append(replica[0].name)
        return [Asked(replica[0], replica[0].process, 0, None)]

    crew.supervisor = type("Supervisor", (), {"ready": lambda self, call: False})()
    with pytest.raises(DeadlineError, match="reward 1 is late"):
        Replicas(crew, [[worker] for worker in workers], Deadline(1, "x")).compute([send])
    assert asked == ["reward 0", "reward 1"]


def test_what_cannot_be_sent_is_the_error_of_who_wants_it_and_of_nobody_else():
    """Whoever looks next sends everybody's pieces."""
    here, found = threading.current_thread(), {}
    crew = SimpleNamespace(
        state=lambda worker: State.HEALTHY if threading.current_thread() is here else State.SUSPECT,
        check=lambda: None, next_done=lambda calls: (calls[0], "computed"),
    )  # fmt: skip
    worker = Worker("reward 0", None)
    shared = Replicas(crew, [[worker]], Deadline(1, "x"))

    def refused(replica):
        raise TypeError("cannot pickle this row")

    def ask():
        try:
            shared.compute([refused])
        except TypeError as error:
            found["other"] = str(error)

    other = threading.Thread(target=ask, daemon=True)
    other.start()
    while not shared.pool.waiting:
        time.sleep(0.01)
    [done] = shared.compute([lambda replica: [Asked(worker, worker.process, 0, None)]])
    other.join(5)
    assert done.values == ["computed"] and found == {"other": "cannot pickle this row"}
    assert not (shared._starts or shared._attempts or shared._refused or shared.pool.open[0])
