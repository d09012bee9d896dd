"""The states of a seat, and a supervisor over simulated processes: no thread, no sleep, thousands of schedules."""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from rlhf_ray.errors import WorkerError
from rlhf_ray.remote.calls import Process, Worker
from rlhf_ray.remote.failures import CutError, LostError
from rlhf_ray.remote.health import BACK_OFF_S, WINDOW_S, Health, Limits, State
from rlhf_ray.remote.supervisor import Sign, Supervisor

LIMITS = Limits(pulse_s=5, suspect_s=10, silence_s=30, restarts=3, start_s=100)
# `make schedules` has 10,000.
SCHEDULES = int(os.environ.get("SCHEDULES", "300"))


@dataclass
class Time:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time():
    return Time()


def loaded(time: Time, limits: Limits = LIMITS) -> Health:
    health = Health(limits, time)
    health.loaded()
    return health


def test_silence_is_waited_for_and_then_it_is_death(time):
    health = loaded(time)
    for now, state in ((15, "HEALTHY"), (15.1, "SUSPECT"), (35, "SUSPECT"), (35.1, "DEAD")):
        time.now = now
        assert health.look() is State[state], now
    health.heard()
    assert health.look() is State.DEAD, "a late answer brings nobody back"


def test_a_loss_of_the_network_of_twenty_seconds_costs_nothing(time):
    health = loaded(time)
    health.doubt()
    time.now = 25
    assert health.look() is State.SUSPECT
    health.heard()
    assert health.look() is State.HEALTHY
    time.now = 25 + 15
    assert health.look() is State.HEALTHY, "silence counts from the last answer"


def test_a_process_that_loads_may_be_silent_but_not_for_ever(time):
    health = Health(LIMITS, time)
    time.now = 10_000
    assert health.look() is State.RESTARTING, "the first start has a deadline of its own"
    health.loaded()
    assert health.look() is State.HEALTHY
    health.lose()
    health.restart()
    time.now += 100
    assert health.look() is State.RESTARTING
    time.now += 0.1
    assert health.look() is State.DEAD


def test_restarts_wait_longer_each_time_until_the_budget_of_the_hour_is_spent(time):
    health, waits = loaded(time), []
    while not health.spent:
        health.lose()
        died = time.now
        while not health.due:
            time.now += 0.5
        waits.append(time.now - died)
        health.restart()
        health.loaded()
    assert waits == [0, BACK_OFF_S, 2 * BACK_OFF_S] and health.restarts == 3
    health.lose()
    time.now += WINDOW_S - 10
    assert not health.due, "the first two of the three are not an hour old"
    time.now += 10
    assert health.due and health.restarts == 0


def test_a_generator_gets_no_work_before_it_has_been_sent_weights(time):
    health = loaded(time)
    health.lose()
    health.restart()
    health.loaded(stale=True)
    health.doubt()
    assert health.state is State.SUSPECT
    health.heard()
    assert health.state is State.STALE, "a sign of life is no weight"
    health.synced()
    assert health.state is State.HEALTHY
    time.now = 20
    health.look()
    health.heard()
    assert health.state is State.HEALTHY


def test_no_edge_leads_from_dead_to_healthy(time):
    health = loaded(time)
    health.lose()
    with pytest.raises(AssertionError, match="no way leads from dead to healthy"):
        health.loaded()


@pytest.mark.parametrize("part", range(10))
def test_any_schedule_keeps_the_rules_of_a_seat(part):
    for seed in range(part, SCHEDULES, 10):
        rng, time = random.Random(seed), Time()
        health, heard, restarts, died = loaded(time), 0.0, [], 0.0
        for _ in range(60):
            time.now += rng.choice([0, 0.3, 2, 4, 9, 40]) * rng.random()
            act = rng.choice(["heard", "doubt", "lose", "restart", "loaded", "look", "look"])
            before = health.state
            if act == "heard":
                health.heard()
                heard = time.now
            elif act == "lose" and before is not State.DEAD:
                health.lose()
            elif act == "restart" and health.due:
                assert before is State.DEAD
                within = [at for at in restarts if time.now - at < WINDOW_S]
                assert len(within) < LIMITS.restarts and (not within or time.now - died >= BACK_OFF_S)
                restarts.append(time.now)
                health.restart()
            elif act == "loaded" and before is State.RESTARTING:
                health.loaded()
                heard = time.now
            elif act in ("doubt", "look"):
                getattr(health, act)()
            silent = time.now - heard
            if act == "look" and before in (State.HEALTHY, State.SUSPECT):
                assert (health.state is State.DEAD) == (silent > 35), (seed, silent)
                assert health.state is not State.HEALTHY or silent <= 15
            if health.state is State.DEAD and before is not State.DEAD:
                died = time.now
            assert before is not State.DEAD or health.state in (State.DEAD, State.RESTARTING)


# ------------------------------------------------------------------- a supervisor over simulated processes


@dataclass
class Asked:
    """A call as the supervisor sees it."""

    worker: Worker
    process: Process
    until: float
    parked: bool = False
    cut_off: bool = False
    needs_no_weights: bool = False


@dataclass
class Simulated:
    """Processes that load, answer, die, hang and are cut off."""

    time: Time
    rng: random.Random
    names: list[str]
    broken_loads: float = 0.0
    workers: dict[str, Worker] = field(default_factory=dict)
    cohorts: dict[int, int] = field(default_factory=dict)  # pid -> which start of its group
    loaded: dict[str, float] = field(default_factory=dict)  # when
    hangs: set[int] = field(default_factory=set)  # pids
    dead: set[int] = field(default_factory=set)
    cut: dict[str, float] = field(default_factory=dict)  # until when
    coming: list = field(default_factory=list)
    numbers: itertools.count = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self):
        for name in self.names:
            self.workers[name] = Worker(name, None, "10.0.0.1", next(self.numbers))

    def later(self, seconds, name, process, kind):
        heapq.heappush(self.coming, (self.time.now + seconds, next(self.numbers), name, process, kind))

    def feel(self, name):
        self.later(LIMITS.pulse_s, name, self.workers[name].process, "alive")

    def wait(self, seconds):
        until, signs = self.time.now + seconds, []
        while self.coming and self.coming[0][0] <= until and not signs:
            self.time.now, _, name, process, kind = heapq.heappop(self.coming)
            signs = list(self.come(name, process, kind))
        if not signs:
            self.time.now = until
        return signs

    def come(self, name, process, kind):
        if kind == "loads":
            if process.pid in self.dead:
                return
            if self.rng.random() < self.broken_loads:
                self.dead.add(process.pid)
                yield Sign(name, "died", RuntimeError("no memory"))
                return
            self.workers[name].process, self.loaded[name] = process, self.time.now
            yield Sign(name, "loaded")
        elif process is not self.workers[name].process or process.pid in self.hangs:
            return
        elif process.pid in self.dead:
            yield Sign(name, "died", RuntimeError("killed"))
        elif self.cut.get(name, 0) > self.time.now:
            self.later(1.0, name, process, "alive")
            yield Sign(name, "out of reach", RuntimeError("cut"))
        else:
            yield Sign(name, "alive")

    def restart(self, names):
        seconds, cohort = self.rng.uniform(1, 40), next(self.numbers)
        for name in names:
            pid = next(self.numbers)
            self.cohorts[pid] = cohort
            self.later(seconds + self.rng.random(), name, Process(None, "10.0.0.1", pid), "loads")

    def end(self, name):
        self.dead.add(self.workers[name].pid)
        self.dead |= {process.pid for *_, other, process, kind in self.coming if other == name and kind == "loads"}
        self.coming = [come for come in self.coming if come[2] != name]
        heapq.heapify(self.coming)

    def who(self, name):
        return Worker(name, None, self.workers[name].node, self.workers[name].pid)


class Run:
    """Calls of every seat, one after the other, and what the waiting for them does when one is lost."""

    def __init__(self, world, supervisor, calls):
        self.world, self.supervisor = world, supervisor
        self.left, self.calls = dict.fromkeys(world.names, calls), {}

    def rejoin(self):
        """What the loop does after a setback: the ranks do their last call once more, all of them."""
        holders = [name for name in self.world.names if name in self.supervisor.holders]
        for name in holders:
            self.calls[name] = None
        self.left |= dict.fromkeys(holders, 1 + max(self.left[name] for name in holders))
        self.supervisor.rejoin()

    def look(self):
        now = self.world.time.now
        if self.supervisor.setback is not None:
            self.rejoin()
        for name, left in self.left.items():
            worker, call = self.world.workers[name], self.calls.get(name)
            if not left or (self.supervisor.setback is not None and name in self.supervisor.holders):
                continue
            state = self.supervisor.seats[name].state
            if call is None and state is not State.HEALTHY:
                if state is State.STALE:
                    self.supervisor.synced(name)
                continue
            if call is None or (call.parked and self.supervisor.ready(call)):
                assert state is State.HEALTHY, "only such a one gets work"
                if name in self.supervisor.holders:
                    peers = self.supervisor.peers(name)
                    assert len({self.world.cohorts.get(self.world.workers[peer].pid) for peer in peers}) == 1
                self.calls[name] = Asked(worker, worker.process, now + self.world.rng.uniform(0.1, 20))
            elif call.parked or call.process.pid in self.world.hangs - self.world.dead:
                continue
            elif call.process.pid in self.world.dead:
                self.lost(call, LostError("killed"))
            elif self.world.cut.get(name, 0) > now:
                self.lost(call, CutError("cut"))
            elif now >= call.until:
                self.left[name], self.calls[name] = left - 1, None

    def lost(self, call, error):
        if call.worker.name not in self.supervisor.replaceable:
            self.supervisor.lost = self.supervisor.lost or "the call itself raised"
            return
        if call.worker.name in self.supervisor.holders:
            self.supervisor.report(call, error)
            self.calls[call.worker.name] = None  # the run goes back; see `rejoin`
            return
        call.parked, call.cut_off = True, isinstance(error, CutError)
        self.supervisor.report(call, error)
        if call.worker.name in self.supervisor.receivers:
            self.calls[call.worker.name] = None  # its work goes to whoever is there


def strike(world: Simulated) -> str:
    name = world.rng.choice(world.names)
    kind, pid = world.rng.choice(["kill", "hang", "cut"]), world.workers[name].pid
    if kind == "cut":
        world.cut[name] = world.time.now + world.rng.uniform(1, 25)
    else:
        {"kill": world.dead, "hang": world.hangs}[kind].add(pid)
    return kind


@pytest.mark.parametrize("part", range(10))
def test_no_schedule_of_losses_leaves_a_run_waiting_for_ever(part):
    """Either all calls are answered, or the run ends because a seat may not be taken any more."""
    ends = Counter()
    for seed in range(part, SCHEDULES, 10):
        rng = random.Random(f"{seed}")
        time = Time()
        ranks = ["learner rank 0", "learner rank 1", "critic rank 0"]
        world = Simulated(time, rng, ["reward", "generator 0", *ranks], rng.choice([0, 0, 0, 0.5]))
        told = []
        supervisor = Supervisor(world, world.names, LIMITS, time, lambda *said, told=told: told.append(said[:2]))
        if rng.random() < 0.3:
            supervisor.built(["reward", "generator 0"], ["generator 0"])
        else:
            supervisor.built(world.names, ["generator 0"], [ranks], ranks)
        run, strikes = Run(world, supervisor, rng.randrange(1, 12)), rng.randrange(5)
        while any(run.left.values()) and supervisor.lost is None:
            supervisor.step(0.5)
            run.look()
            if strikes and rng.random() < 0.05:
                strikes -= 1
                strike(world)
            assert time.now < 20_000, f"schedule {seed} never ends"
        lost = Counter(name for kind, name in told if kind == "worker_lost")
        restarted = Counter(name for kind, name in told if kind == "worker_restarted")
        if supervisor.lost is None:
            assert not any(run.left.values())
        elif not isinstance(supervisor.lost, str) and supervisor.lost.name in supervisor.replaceable:
            peers = supervisor.peers(supervisor.lost.name)
            times = sum(lost[peer] for peer in peers)
            assert times == LIMITS.restarts + 1, "as often as the budget allows, and once more"
        assert all(restarted[name] <= min(lost[name], LIMITS.restarts) for name in world.names)
        ends[supervisor.lost is None] += 1
    assert ends[True] > ends[False] > 0, "both ends have been tried"


# ------------------------------------------------------------------- what is said


def supervised(time: Time, replaceable: list[str], limits: Limits = LIMITS) -> tuple[Simulated, Supervisor, list]:
    world, told = Simulated(time, random.Random(1), ["reward", "learner rank 0"]), []
    supervisor = Supervisor(world, world.names, limits, time, lambda *said: told.append(said))
    supervisor.built(replaceable)
    return world, supervisor, told


def run_until(supervisor: Supervisor, time: Time, end: float) -> None:
    while time.now < end:
        supervisor.step(0.5)


def test_a_lost_worker_is_replaced_and_said_so_in_plain_words(time):
    world, supervisor, told = supervised(time, ["reward"])
    world.dead.add(1)
    run_until(supervisor, time, 60)
    # That all is loaded is heard at the end of the first look, after 0.5 s, and the first answer is due after 5 s.
    seconds = f"it was noticed within 4.5 s, and took {world.loaded['reward'] - 5:.1f} s to start"
    assert told == [
        ("worker_lost", "reward", "reward (node 10.0.0.1, pid 1) died: killed"),
        ("worker_restarted", "reward", f"reward (node 10.0.0.1, pid {world.workers['reward'].pid}) has taken the place "
         f"of the one that was lost; {seconds}"),
    ]  # fmt: skip
    assert world.workers["reward"].pid != 1 and supervisor.lost is None


def test_who_has_not_been_heard_because_the_listener_was_stopped_is_not_lost(time):
    """A scheduler stops all processes of a job for ten minutes; their signs are heard one by one afterwards."""
    world, supervisor, told = supervised(time, ["reward"])
    run_until(supervisor, time, 20)
    world.coming = [(at + 600, *rest) for at, *rest in world.coming]
    time.now += 600
    run_until(supervisor, time, 640)
    assert told == [] and [health.state for health in supervisor.seats.values()] == [State.HEALTHY] * 2
    world.hangs.add(1)
    run_until(supervisor, time, 700)
    assert [kind for kind, *_ in told] == ["worker_silent", "worker_lost", "worker_restarted"]


RANKS = ["learner rank 0", "learner rank 1"]


def ranks(time: Time, limits: Limits = LIMITS) -> tuple[Simulated, Supervisor, list]:
    """Pids: learner rank 0: 1, learner rank 1: 2, reward: 3."""
    world, told = Simulated(time, random.Random(1), [*RANKS, "reward"]), []
    supervisor = Supervisor(world, world.names, limits, time, lambda *said: told.append(said))
    supervisor.built(world.names, together=[RANKS], holders=RANKS)
    return world, supervisor, told


def test_ranks_are_lost_together_and_their_successors_get_no_work_before_the_run_has_gone_back(time):
    world, supervisor, told = ranks(time)
    world.dead.add(2)
    run_until(supervisor, time, 60)
    assert 1 in world.dead and 3 not in world.dead
    assert [said[:2] for said in told] == [("worker_lost", "learner rank 1"), ("worker_restarted", "learner rank 1")]
    pids = [world.workers[name].pid for name in RANKS]
    assert all(f"learner rank {i} (node 10.0.0.1, pid {pid})" in told[1][2] for i, pid in enumerate(pids))
    assert [supervisor.seats[name].state for name in RANKS] == [State.STALE] * 2 and supervisor.lost is None
    setback = supervisor.setback
    assert (setback.name, setback.detect_s, setback.at) == ("learner rank 1", 4.5, 5)
    assert setback.start_s == max(world.loaded.values()) - 5
    supervisor.rejoin()
    supervisor.step(0.5)
    assert [supervisor.seats[name].state for name in RANKS] == [State.HEALTHY] * 2 and supervisor.setback is None


def test_a_rank_that_dies_while_its_peers_load_begins_it_all_again(time):
    world, supervisor, told = ranks(time)
    world.dead.add(1)
    while world.loaded.keys() < set(RANKS):
        supervisor.step(0.5)
    world.dead.add(world.workers["learner rank 0"].pid)
    supervisor.rejoin()
    run_until(supervisor, time, time.now + 100)
    assert [kind for kind, *_ in told] == ["worker_lost", "worker_restarted"] * 2
    assert supervisor.setback is not None or supervisor.overcome is not None
    assert len({world.cohorts[world.workers[name].pid] for name in RANKS}) == 1


def test_the_cause_of_an_error_that_a_rank_reports_may_be_anothers_death(time):
    world, supervisor, told = ranks(time)
    worker = world.workers["learner rank 0"]
    supervisor.report(Asked(worker, worker.process, 0), LostError("connection closed by peer"))
    supervisor.step(0.5)
    assert supervisor.setback is None, "its cause may show"
    world.dead.add(2)
    run_until(supervisor, time, 6)
    assert told == [("worker_lost", "learner rank 1", "learner rank 1 (node 10.0.0.1, pid 2) died: killed")]


def test_an_error_that_nothing_explains_is_the_ranks_own(time):
    world, supervisor, told = ranks(time)
    worker = world.workers["learner rank 0"]
    supervisor.report(Asked(worker, worker.process, 0), LostError("no memory\ntraceback"))
    run_until(supervisor, time, 7)
    assert told == [("worker_lost", "learner rank 0", "no memory")]


def test_ranks_whose_budget_is_spent_end_the_run(time):
    world, supervisor, told = ranks(time)
    world.broken_loads = 1.0
    world.dead.add(2)
    run_until(supervisor, time, 400)
    assert [kind for kind, *_ in told] == ["worker_lost"] * 4
    assert str(supervisor.lost.error("during learn")).endswith(
        "it had been started again 3 times within an hour, and ray.restarts=3"
    )


def test_a_worker_that_is_cut_off_for_twenty_seconds_stays(time):
    world, supervisor, told = supervised(time, ["reward"])
    world.cut = {"reward": 25.0, "learner rank 0": 25.0}
    run_until(supervisor, time, 60)
    assert [kind for kind, *_ in told] == ["worker_silent"] * 2 + ["worker_answers"] * 2
    assert told[0][2] == (
        "reward (node 10.0.0.1, pid 1) gives no sign of life; it is waited for, up to 35 s (ray.silence_s)"
    )
    assert supervisor.lost is None and [w.pid for w in world.workers.values()] == [1, 2]


def test_a_worker_that_hangs_is_replaced(time):
    world, supervisor, told = supervised(time, ["reward"])
    world.hangs.add(1)
    run_until(supervisor, time, 100)
    assert [kind for kind, *_ in told] == ["worker_silent", "worker_lost", "worker_restarted"]
    assert told[1][2].startswith("reward (node 10.0.0.1, pid 1) gave no sign of life for 3") and 1 in world.dead


def test_who_holds_what_nobody_else_has_ends_the_run(time):
    world, supervisor, told = supervised(time, ["reward"])
    world.dead.add(2)
    run_until(supervisor, time, 20)
    assert supervisor.lost.name == "learner rank 0" and not told
    error = supervisor.lost.error("during update")
    assert type(error) is LostError and str(error).startswith(
        "learner rank 0 (node 10.0.0.1, pid 2) died during update: killed; look for a signal"
    )


def test_what_a_lost_worker_says_late_changes_nothing(time):
    world, supervisor, told = supervised(time, ["reward"])
    learner = world.workers["learner rank 0"].process
    world.hangs.add(learner.pid)
    run_until(supervisor, time, 60)
    for late in ("answers", "is killed"):
        world.later(1, "learner rank 0", learner, "alive")
        world.hangs.discard(learner.pid)
        world.dead |= {learner.pid} if late == "is killed" else set()
        run_until(supervisor, time, time.now + 20)
        assert supervisor.seats["learner rank 0"].state is State.DEAD
    assert "gave no sign of life" in str(supervisor.lost.error("during update"))


def test_a_call_of_a_process_that_was_replaced_costs_the_next_one_nothing(time):
    world, supervisor, told = supervised(time, ["reward"])
    worker = world.workers["reward"]
    late = Asked(worker, worker.process, 0)
    world.dead.add(1)
    run_until(supervisor, time, 60)
    supervisor.report(late, LostError("killed"))
    run_until(supervisor, time, 120)
    assert [kind for kind, *_ in told] == ["worker_lost", "worker_restarted"] and supervisor.ready(late)


def test_a_call_that_was_cut_off_waits_for_a_sign_of_life(time):
    world, supervisor, told = supervised(time, ["reward"])
    worker = world.workers["reward"]
    call = Asked(worker, worker.process, 0, cut_off=True)
    supervisor.report(call, CutError("cut"))
    supervisor.step(0.5)
    assert [kind for kind, *_ in told] == ["worker_silent"] and not supervisor.ready(call)
    run_until(supervisor, time, 10)
    assert [kind for kind, *_ in told] == ["worker_silent", "worker_answers"] and supervisor.ready(call)
    assert worker.pid == 1


def test_a_seat_whose_budget_is_spent_ends_the_run_with_the_last_error(time):
    world, supervisor, told = supervised(time, ["reward"])
    world.broken_loads = 1.0
    world.dead.add(1)
    run_until(supervisor, time, 400)
    assert [kind for kind, *_ in told] == ["worker_lost"] * 4
    error = supervisor.lost.error("during score")
    assert isinstance(error, WorkerError) and "died during score: no memory" in str(error)
    assert str(error).endswith("it had been started again 3 times within an hour, and ray.restarts=3")


def test_without_a_budget_the_run_ends_at_the_first_loss(time):
    world, supervisor, told = supervised(time, ["reward"], replace(LIMITS, restarts=0))
    world.dead.add(1)
    run_until(supervisor, time, 20)
    assert "started again" not in str(supervisor.lost.error("during score"))
    assert [kind for kind, *_ in told] == ["worker_lost"]
