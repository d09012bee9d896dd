"""Workers that die, hang and fail, on a real Ray; their role is a toy, so that each case takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import ray

from rlhf_ray import errors
from rlhf_ray.config.sections import RayConfig
from rlhf_ray.errors import DeadlineError, ForeignError, RlhfRayError, SyncError, WorkerError
from rlhf_ray.remote import calls, crew
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.failures import LostError, reported
from rlhf_ray.remote.health import Limits
from rlhf_ray.remote.host import Host, Surroundings
from rlhf_ray.remote.supervisor import Tell, untold

pytestmark = pytest.mark.engine

# Workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMITS = Limits.of(RayConfig())
OWN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RlhfRayError)]
OWN.remove(errors.EngineError)  # of an engine that is dead: it travels as LostError


class Toy(Host):
    def ask(self, name, args, keywords):
        return getattr(self, name)(*args, **keywords)  # it is its own role

    @reported
    def echo(self, value):
        return value

    @reported
    def wait(self, seconds):
        time.sleep(seconds)
        return seconds

    @reported
    def fail(self, error):
        raise error

    @reported
    @ray.method(num_returns=2)
    def large(self, value, fails=False):
        if fails:
            raise errors.RewardError("no number")
        return [value] * 3, None

    @reported
    def learn(self, what):
        self.knows = what

    @reported
    def pid_and_more(self, seconds, fails_in=None):
        """(pid, what it has learned), after a while; in that process it ends in `fails_in[1]`."""
        time.sleep(seconds)
        if fails_in and fails_in[0] in (os.getpid(), "any"):
            raise fails_in[1]
        return os.getpid(), self.knows

    @reported
    def hang_in(self, pid):
        while os.getpid() == pid:
            time.sleep(0.1)
        return os.getpid(), self.knows

    @reported
    def start_weight_update(self):
        while self.knows == "nothing":
            time.sleep(0.1)
        if self.knows == "half":
            raise SyncError("an earlier weight update was cut off half-way")

    @reported
    def fail_after_a_peers_death(self, pid):
        """What a rank of a collective does: it waits for its peer, and hears only that the connection closed."""
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.05)
        raise RuntimeError("Connection closed by peer")


@pytest.fixture
def hire(own_ray, tmp_path):
    """`hire(2)`: a watched crew of two toys; `loaded=False`: one that still imports its libraries; `loads={...}`: seats
    that another process may take."""
    crews = []

    def make(count: int, loaded: bool = True, limits: Limits = LIMITS, tell: Tell = untold, **built) -> Crew:
        made = Crew(limits, tell)
        crews.append(made)
        for rank in range(count):
            made.hire(Toy, f"learner rank {rank}", {"num_cpus": 0.1}, Surroundings(str(tmp_path)))
        made.locate(Deadline(60, "ray.start_deadline_s"))
        if loaded:
            made.built(**built)
        return made

    yield make
    for made in crews:
        made.dismiss()


def call(team: Crew, rank: int, method, *args, seconds: float = 60):
    return team.workers[rank].start(method, *args, deadline=Deadline(seconds, "ray.call_deadline_s"))


def dies_in(seconds: float, team: Crew, rank: int, sign: int = signal.SIGKILL) -> None:
    threading.Timer(seconds, partial(os.kill, team.workers[rank].pid, sign)).start()


def test_results_come_in_order(hire):
    team = hire(2)
    started = [call(team, 0, Toy.wait, 0.5), call(team, 1, Toy.echo, "b"), call(team, 0, Toy.echo, "c")]
    assert team.results(started) == [0.5, "b", "c"]
    first, value = team.next_done([call(team, 0, Toy.wait, 1), call(team, 1, Toy.echo, "quick")])
    assert (first.worker.name, value) == ("learner rank 1", "quick")


def test_workers_are_known_by_name_node_and_pid(hire, tmp_path):
    team = hire(1)
    assert str(team.workers[0]) == f"learner rank 0 (node {ray.util.get_node_ip_address()}, pid {team.workers[0].pid})"
    assert os.path.samefile(f"/proc/{team.workers[0].pid}/cwd", tmp_path), "paths in a config mean the same everywhere"


def test_own_errors_keep_their_type_over_ray(hire):
    team = hire(1)
    for kind in OWN:
        with pytest.raises(kind) as caught:
            team.result(call(team, 0, Toy.fail, kind("what, why, what to do")))
        assert type(caught.value) is kind and str(caught.value) == "what, why, what to do"


def test_foreign_errors_are_quoted(hire, monkeypatch):
    monkeypatch.setattr(crew, "CAUSE_S", 0.5)
    team = hire(1)
    with pytest.raises(ForeignError, match="learner rank 0: fail failed: KeyError: 'x'\n--- traceback of the worker"):
        team.result(call(team, 0, Toy.fail, KeyError("x")))
    assert team.result(call(team, 0, Toy.echo, 1)) == 1, "the worker lives on"


def test_a_killed_worker_is_named_at_once(hire):
    team = hire(1)
    dies_in(0.5, team, 0)
    with pytest.raises(LostError, match=rf"learner rank 0 \(node .*, pid {team.workers[0].pid}\) died during wait"):
        team.result(call(team, 0, Toy.wait, 1000, seconds=2000))


def test_the_death_of_another_worker_ends_the_wait(hire):
    team = hire(2)
    dies_in(0.5, team, 1)
    with pytest.raises(WorkerError, match="learner rank 1 .* died while the run waited for wait of learner rank 0"):
        team.result(call(team, 0, Toy.wait, 1000, seconds=2000))


def test_the_dead_rank_is_named_not_the_one_that_noticed(hire):
    team = hire(2)
    pid = team.workers[1].pid
    dies_in(0.5, team, 1)
    with pytest.raises(WorkerError, match=rf"learner rank 1 \(node .*, pid {pid}\) died"):
        team.result(call(team, 0, Toy.fail_after_a_peers_death, pid))


def test_a_death_between_calls_is_noticed_at_the_next(hire):
    team = hire(2)
    os.kill(team.workers[1].pid, signal.SIGKILL)
    time.sleep(3)
    with pytest.raises(WorkerError, match="learner rank 1 .* died while the run waited for wait"):
        team.result(call(team, 0, Toy.wait, 30))


def test_a_stopped_worker_is_noticed_by_its_silence(hire):
    team = hire(2, limits=replace(LIMITS, pulse_s=1, suspect_s=1, silence_s=4))
    os.kill(team.workers[1].pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError, match=r"learner rank 1 .* hangs: it gave no sign of life for \d+ s"):
        team.result(call(team, 1, Toy.echo, 1, seconds=2000))


def test_while_models_load_a_death_is_noticed_and_silence_is_not(hire):
    team = hire(2, loaded=False, limits=replace(LIMITS, pulse_s=0.5, suspect_s=0.5, silence_s=1))
    os.kill(team.workers[1].pid, signal.SIGSTOP)
    assert team.result(call(team, 0, Toy.wait, 4)) == 4
    os.kill(team.workers[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="learner rank 1 .* died while the run waited for wait of learner rank 0"):
        team.result(call(team, 0, Toy.wait, 60, seconds=100))


def test_real_limits_end_a_hung_run_within_a_minute():
    assert LIMITS.pulse_s + LIMITS.silence_s + crew.CAUSE_S + crew.LOOK_S + calls.POLL_S < 55


def test_a_worker_that_computes_is_not_taken_for_a_hung_one(hire):
    team = hire(1, limits=replace(LIMITS, pulse_s=0.5, suspect_s=1, silence_s=2))
    assert team.result(call(team, 0, Toy.wait, 6)) == 6


def test_deadline_of_a_call(hire):
    told = []
    team = hire(1, tell=lambda *said: told.append(said))
    says = "wait of learner rank 0 .*, with prompts 3, 5, 9, did not return within 3 s: .* raise ray.call_deadline_s"
    with pytest.raises(DeadlineError, match=says):
        team.result(call(team, 0, Toy.wait, 30, seconds=3).about(lambda: [9, 3, 3, 5]))
    [(kind, name, text)] = told
    assert (kind, name) == ("call_slow", "learner rank 0") and text.endswith("its limit is 3 s (ray.call_deadline_s)")
    assert text.startswith(f"wait of {team.workers[0]}, with prompts 3, 5, 9, has been under way for")


def test_prompts_of_a_call_are_counted_where_they_are_many():
    stuck = calls.Call(calls.Worker("generator 0", None), "write", lambda actor: "ref", Deadline(60, "no setting"))
    assert stuck.prompts_in_words == ""
    assert stuck.about(lambda: [7]).prompts_in_words == ", with prompt 7,"
    assert stuck.about(lambda: range(40)).prompts_in_words == ", with prompts 0, 1, 2, 3, 4 and 35 more,"


def test_a_group_that_loses_a_rank_is_killed_whole(hire):
    team = hire(2)
    group = Group(team, team.workers, Deadline(100, "ray.call_deadline_s"))
    assert group.call(Toy.echo, 7) == 7
    dies_in(0.5, team, 1)
    with pytest.raises(WorkerError, match="learner rank 1"):
        group.call(Toy.wait, 50)
    for worker in team.workers:
        while os.path.exists(f"/proc/{worker.pid}"):  # the test's time limit ends it
            time.sleep(0.1)


def test_large_results_stay_with_the_worker(hire):
    team = hire(1)
    started = call(team, 0, Toy.large, 4)
    assert team.result(started) is None and [ray.get(ref) for ref in started.kept] == [[4, 4, 4]]
    started = call(team, 0, Toy.large, 4, True)
    with pytest.raises(errors.RewardError, match="no number"):
        team.result(started)


def test_dismissed_workers_are_gone_even_a_stopped_one(hire):
    team = hire(2)
    pids = [worker.pid for worker in team.workers]
    os.kill(pids[1], signal.SIGSTOP)
    team.dismiss()
    # Ray asks first, and kills a process that does not answer after 5 s. The test's time limit ends it.
    while any(map(os.path.exists, (f"/proc/{pid}" for pid in pids))):
        time.sleep(0.1)


ANEW = {"learner rank 0": [(Toy.learn, ("all",))]}


def kinds(told: list[tuple[str, str, str]]) -> list[str]:
    return [kind for kind, *_ in told]


def test_the_seat_of_a_killed_worker_is_taken_by_another_and_its_call_goes_out_again(hire):
    told = []
    team = hire(2, tell=lambda *said: told.append(said), loads=ANEW)
    first = team.workers[0].pid
    dies_in(0.5, team, 0)
    # The other one's wait is not ended by it.
    (pid, knows), other = team.results([call(team, 0, Toy.pid_and_more, 2), call(team, 1, Toy.wait, 3)])
    assert knows == "all" and other == 3 and pid == team.workers[0].pid != first
    assert kinds(told) == ["worker_lost", "worker_restarted"]
    assert {name for _, name, _ in told} == {"learner rank 0"}
    assert f"pid {first}) died: Worker unexpectedly exits" in told[0][2] and f"pid {pid}) has taken" in told[1][2]
    os.kill(team.workers[1].pid, signal.SIGKILL)
    with pytest.raises(LostError, match="learner rank 1 .* died"):
        team.result(call(team, 0, Toy.wait, 60, seconds=100))


def test_a_process_that_broke_is_replaced_though_it_lives(hire):
    told = []
    team = hire(1, tell=lambda *said: told.append(said), loads=ANEW)
    first = team.workers[0].pid
    pid, _ = team.result(call(team, 0, Toy.pid_and_more, 0, (first, MemoryError("no room"))))
    assert pid != first and kinds(told) == ["worker_lost", "worker_restarted"]
    assert told[0][2].startswith("learner rank 0: pid_and_more failed: MemoryError: no room; its process")
    with pytest.raises(ForeignError, match="bad row"):
        team.result(call(team, 0, Toy.pid_and_more, 0, ("any", ValueError("bad row"))))
    assert len(told) == 2, "work that fails everywhere is not repeated"


def test_a_worker_that_stops_for_a_while_is_waited_for_and_one_that_stays_stopped_is_replaced(hire):
    told = []
    limits = replace(LIMITS, pulse_s=0.5, suspect_s=1.5, silence_s=8)
    team = hire(1, limits=limits, tell=lambda *said: told.append(said), loads=ANEW)
    team.result(call(team, 0, Toy.learn, "all"))
    first = team.workers[0].pid
    os.kill(first, signal.SIGSTOP)
    threading.Timer(4, partial(os.kill, first, signal.SIGCONT)).start()
    assert team.result(call(team, 0, Toy.pid_and_more, 1)) == (first, "all")
    while len(told) < 2:  # the test's time limit ends it
        time.sleep(0.1)
    assert kinds(told) == ["worker_silent", "worker_answers"]
    os.kill(first, signal.SIGSTOP)
    pid, _ = team.result(call(team, 0, Toy.pid_and_more, 0))
    assert pid != first and kinds(told)[2:] == ["worker_silent", "worker_lost", "worker_restarted"]


def test_a_call_that_is_late_gets_one_more_try_in_another_process(hire):
    told = []
    team = hire(1, tell=lambda *said: told.append(said), loads=ANEW)
    first = team.workers[0].pid
    pid, _ = team.result(call(team, 0, Toy.hang_in, first, seconds=8))
    assert pid != first and kinds(told) == ["call_slow", "worker_lost", "worker_restarted"]
    assert "hang_in of learner rank 0" in told[1][2] and "did not return within 8 s" in told[1][2]
    with pytest.raises(DeadlineError, match="wait of learner rank 0 .* within 2 s"):
        team.result(call(team, 0, Toy.wait, 60, seconds=2))
    assert [kind for kind in kinds(told)[3:] if kind != "call_slow"] == ["worker_lost", "worker_restarted"]


@pytest.mark.parametrize(("knows", "replaced"), [("nothing", True), ("half", True), ("nothing", False)])
def test_who_does_not_follow_a_weight_update_is_left_out_where_another_takes_its_place(hire, knows, replaced):
    """It would hold half of the weights, and might answer again: it is ended. Also one that was left in the midst of an
    update before, by a learner that is lost."""
    team = hire(2)
    for rank, what in enumerate((knows, "all")):
        team.result(call(team, rank, Toy.learn, what))
    client = GeneratorsClient(
        team.workers, workers_each=1, deadline=Deadline(3, "sync.deadline_s"), replaced=replaced
    )  # fmt: skip
    late, other = team.workers
    if not replaced:
        with pytest.raises(DeadlineError, match="start_weight_update of learner rank 0 .* sync.deadline_s"):
            client.start_weight_update()
        assert client.generators == [late, other] and not gone(late.pid)
        return
    client.start_weight_update()
    assert client.generators == [other]
    while not gone(late.pid):  # the test's time limit ends it
        time.sleep(0.1)
    client.start_weight_update()
    client.join(team.workers[1])
    assert client.generators == [other], "a seat is one of them once"
    assert client.only(late).generators == [late] and client.only(late).replaced


def test_a_seat_that_kills_everybody_ends_the_run(hire):
    team = hire(1, limits=replace(LIMITS, restarts=1), loads=ANEW)
    with pytest.raises(LostError, match="no room.* it had been started again once within an hour, and ray.restarts=1"):
        team.result(call(team, 0, Toy.pid_and_more, 0, ("any", MemoryError("no room"))))


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("lost", [False, True], ids=["under way", "lost, and not yet sent again"])
def test_after_the_dismissal_no_thread_waits_for_a_call_any_more(hire, lost):
    """Nobody would give the seat to another process, so the call would never go out again."""
    told = []
    team = hire(1, tell=lambda *said: told.append(said), loads={"learner rank 0": [(Toy.wait, (1000,))]})
    under_way, errors = call(team, 0, Toy.wait, 1000, seconds=2000), []

    def wait() -> None:
        try:
            team.result(under_way)
        except WorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    if lost:
        os.kill(team.workers[0].pid, signal.SIGKILL)
        while not (under_way.parked and told):  # the test's time limit ends it
            time.sleep(0.05)
    team.dismiss()
    thread.join(60)
    assert [str(error) for error in errors] == ["the run is over, and its workers have been ended"]


def test_a_successor_that_cannot_load_is_ended(hire):
    """It would keep its memory and its GPUs until the run ends."""
    team = hire(1, limits=replace(LIMITS, restarts=1), loads={"learner rank 0": [(Toy.fail, (ValueError("no file"),))]})
    first = team.workers[0].pid
    os.kill(first, signal.SIGKILL)
    with pytest.raises(LostError, match=r"died .*no file"):
        team.result(call(team, 0, Toy.wait, 1000, seconds=2000))
    successor = team.processes.who("learner rank 0").pid
    assert successor not in (0, first)
    until = time.monotonic() + 60
    while not gone(successor) and time.monotonic() < until:
        time.sleep(0.1)
    assert gone(successor)
