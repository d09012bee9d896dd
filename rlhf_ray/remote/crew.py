"""All actors of a run: started at once, watched, waited for, and killed together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from rlhf_ray.errors import DeadlineError, RanksLostError, RlhfRayError, SyncError, WorkerError
from rlhf_ray.pulse import beat
from rlhf_ray.remote.calls import Call, Deadline, Process, Worker, first_result
from rlhf_ray.remote.failures import CutError, LostError
from rlhf_ray.remote.health import Limits, State
from rlhf_ray.remote.host import Host, Place, Surroundings
from rlhf_ray.remote.processes import Processes, Recipe, Steps, kill
from rlhf_ray.remote.supervisor import CAUSE_S, Loss, Setback, Supervisor, Tell, untold

LOOK_S = 0.5
FAREWELL = Deadline(10.0, "no setting")


class GoneError(LostError):
    """A call was lost with a process whose place another will take; it is for another seat, or that one needs weights
    before it can do it. The cause says how it was lost."""

    def __init__(self, message: str, call: Call) -> None:
        super().__init__(message)
        self.call = call


class Crew:
    """Waits for calls, and meanwhile watches every worker, not only the one that was called.

    A worker that dies ends every wait within seconds, named, and one whose process has stopped after a while of silence
    (`limits`): also when the call under way is another worker's, which would wait for the lost one in a collective. The
    seats that `built` calls replaceable are taken by another process instead, and calls that were lost go out again.
    Deaths are seen from `locate` on; silence counts from `built` on, for an import may block a process for minutes.
    A call that is stuck in a process that still answers is left to its own deadline; in a replaceable seat another
    process may try it once more. Of seats that hold what nobody else has no call goes out again: every wait ends with
    RanksLostError, until `rejoin`.

    Args:
        tell: hears of every fault and what was done about it, in a thread of its own, and of slow calls.
    """

    def __init__(self, limits: Limits, tell: Tell = untold) -> None:
        self.limits = limits
        self.tell = tell
        self.processes = Processes(limits.pulse_s)
        self.supervisor: Supervisor | None = None
        self._broken: Exception | None = None
        self._waiting = 0  # threads
        self._lock = threading.Lock()  # of that number
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def workers(self) -> list[Worker]:
        return list(self.processes.workers.values())

    def hire(self, host: type[Host], name: str, options: dict[str, Any], around: Surroundings) -> Worker:
        """Start an actor; returns before it runs."""
        return self.processes.hire(name, Recipe(host, options, around))

    def locate(self, deadline: Deadline) -> dict[str, Place]:
        """Wait until every actor runs; afterwards each is known by node and pid, and watched. The key is the worker's
        name."""
        calls = [worker.start(Host.place, deadline=deadline) for worker in self.workers]
        places = dict(zip((worker.name for worker in self.workers), self.results(calls), strict=True))
        for worker in self.workers:
            worker.process = Process(worker.actor, places[worker.name].node, places[worker.name].pid)
        here = ray.util.get_node_ip_address()
        self.supervisor = Supervisor(
            self.processes, self.processes.workers, self.limits, time.monotonic, self.tell, here
        )  # fmt: skip
        self._watcher = threading.Thread(target=self._watch, name="crew-watch", daemon=True)
        self._watcher.start()
        return places

    def built(
        self, loads: Mapping[str, Steps] = {}, receivers: Sequence[str] = (),
        together: Sequence[Sequence[str]] = (), holders: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Everything is loaded: from now on, who says nothing for long is lost.

        Args:
            loads: seats that another process may take, by name, and what it must do first. All their calls may be
                repeated, but for those of receivers and holders.
            receivers: need weights first: they raise GoneError.
            together: groups of seats that live and die together.
            holders: hold what nobody else has.
        """
        self.processes.loads = dict(loads)
        self.supervisor.built(loads, receivers, together, holders)

    def named(self, prefix: str) -> list[Worker]:
        """Workers of a role, in the order of hiring."""
        return [worker for worker in self.workers if worker.name.split()[0] == prefix]

    def state(self, worker: Worker) -> State:
        return self.supervisor.seats[worker.name].state

    def synced(self, worker: Worker) -> None:
        """A stale process has been sent the weights; returns when it is known."""
        while self.state(worker) is State.STALE:
            self.supervisor.synced(worker.name)  # again, where it was under suspicion when that was heard
            self.check()
            time.sleep(0.05)

    # ------------------------------------------------------------ waiting

    def results(self, calls: Sequence[Call], done: Callable[[Call], None] = lambda call: None) -> list[Any]:
        """The results of all calls, in order; `done` hears of each at once. The first failure raises."""
        waiting, values = list(calls), {}
        while waiting:
            call, values[call] = self.next_done(waiting)
            waiting.remove(call)
            done(call)
        return [values[call] for call in calls]

    def result(self, call: Call) -> Any:
        return self.results([call])[0]

    def next_done(self, calls: Sequence[Call]) -> tuple[Call, Any]:
        """The first call that ends, and its result."""
        with self._lock:
            self._waiting += 1
        try:
            return first_result(calls, self.check, self._again)
        except (GoneError, RanksLostError):
            raise
        except (WorkerError, SyncError) as error:
            raise self._cause_of(error, calls) from None
        finally:
            with self._lock:
                self._waiting -= 1

    def check(self, calls: Sequence[Call] = ()) -> None:
        """Raises if a worker is lost for good, or all have been dismissed; calls that were lost with another go out
        again, once they can."""
        beat()
        if self._broken is not None:
            raise WorkerError(f"the watch over the workers has failed: {self._broken!r}") from self._broken
        if self._loss is None:
            if self._closing.is_set():  # nobody watches any more, and no seat is taken by another process
                raise WorkerError("the run is over, and its workers have been ended")
            if self._setback is not None:
                raise RanksLostError(
                    f"{self._setback.what}; other processes take the seats of all ranks that learn, and what these "
                    "held is in the newest checkpoint"
                )
            for call in calls:
                self._send_again(call)
                self._tell_if_slow(call)
            return
        own = next((call for call in calls if call.worker.name == self._loss.name), None)
        when = f"during {own.name}" if own else f"while the run waited for {calls[0]}" if calls else "between calls"
        raise self._loss.error(when)

    @property
    def _watches(self) -> bool:
        return self._watcher is not None and not self._closing.is_set()

    @property
    def _loss(self) -> Loss | None:
        return self.supervisor.lost if self.supervisor else None

    @property
    def _setback(self) -> Setback | None:
        return self.supervisor.setback if self.supervisor else None

    def rejoin(self) -> dict[str, float]:
        """After RanksLostError, in the thread that goes back: wait until other processes have taken the seats and
        until no thread waits for what was asked before. Returns seconds: `detect`, `start`."""
        while self._setback is not None:
            beat()
            if self._loss is not None or not self._watches or self._broken is not None:
                self.check()
            if not self._waiting:
                self.supervisor.rejoin()
            time.sleep(0.05)
        return {"detect": self.supervisor.overcome.detect_s, "start": self.supervisor.overcome.start_s}

    def _again(self, call: Call, error: LostError | DeadlineError) -> bool:
        if self.supervisor is None or call.worker.name not in self.supervisor.replaceable:
            return False
        if call.worker.name in self.supervisor.holders:
            if not self._blames_another(call, error):
                self.supervisor.report(call, error)
                self._wait_for(lambda: self._loss or self._setback, 2 * CAUSE_S)
                self.check([call])
            return False
        if isinstance(error, DeadlineError) and call.tries > 1:
            return False  # not that process was stuck: the work is too much
        call.park(cut_off=isinstance(error, CutError))
        self.supervisor.report(call, error)
        needs_weights = call.worker.name in self.supervisor.receivers and not call.needs_no_weights
        if needs_weights or call.elsewhere:
            raise GoneError(f"{error}", call) from error
        return True

    def _send_again(self, call: Call) -> None:
        if call.parked and self.supervisor.ready(call):
            call.start()
        elif call.parked and (able := [seat for seat in call.others if self.state(seat) is State.HEALTHY]):
            call.worker = able[0]
            call.start()

    def _tell_if_slow(self, call: Call) -> None:
        """Once, when half of its time is gone: a run that stands still says what it waits for."""
        under_way = call.deadline.seconds - (call.until - time.monotonic())
        if not (call.parked or call.told_slow) and under_way > call.deadline.seconds / 2:
            call.told_slow = True
            text = f"{call}{call.prompts_in_words} has been under way for {under_way:.0f} s"
            limit = f"its limit is {call.deadline.seconds:.0f} s ({call.deadline.setting})"
            self.tell("call_slow", call.worker.name, f"{text}; {limit}")

    def _cause_of(self, error: RlhfRayError, calls: Sequence[Call]) -> RlhfRayError:
        """The death behind an error, if there is one: the error may be only what others noticed of it, in any words.
        A rank that sends weights, and gathers them from one that is gone, says that they did not arrive."""
        self._wait_for(lambda: self._loss or self._setback, CAUSE_S)
        if self._loss is not None and self._loss.who in str(error):
            return error
        try:
            self.check(calls)
        except RlhfRayError as cause:
            return cause
        return error

    def _wait_for(self, word: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._watches and word() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _blames_another(self, call: Call, error: Exception) -> bool:
        """Whether a process says in `error` that not it was lost but one that it called: a learner, of a generator."""
        peers, text = self.supervisor.peers(call.worker.name), str(error)
        return any(f"{worker.name} (node " in text for worker in self.workers if worker.name not in peers)

    def _watch(self) -> None:
        try:
            while not self._closing.is_set():
                self.supervisor.step(LOOK_S)
        except Exception as error:  # whatever it is: nobody would notice a death any more
            self._broken = error

    # ------------------------------------------------------------ ending

    def dismiss(self, farewell: Sequence[tuple[Worker, Callable[..., Any]]] = ()) -> None:
        """Kill every actor. `farewell` methods are given a moment first; what they raise does not matter any more."""
        self._closing.set()
        with contextlib.suppress(Exception):
            calls = [worker.start(method, deadline=FAREWELL) for worker, method in farewell]
            ray.wait([call.ref for call in calls], num_returns=len(calls), timeout=FAREWELL.seconds)
        if self._watcher is not None:
            self._watcher.join()
        self.processes.end_all()

    def kill(self, workers: Sequence[Worker]) -> None:
        """For good."""
        if self.supervisor is not None:
            self.supervisor.retire(worker.name for worker in workers)
        for worker in workers:
            kill(worker.actor)


class Group:
    """The ranks of one role. Every call goes to all of them, because every call is a collective."""

    def __init__(self, crew: Crew, ranks: Sequence[Worker], deadline: Deadline) -> None:
        self.crew = crew
        self.ranks = list(ranks)
        self.deadline = deadline

    def call(
        self, method: Callable[..., Any], *args: Any, deadline: Deadline | None = None, keywords: Mapping[str, Any] = {}
    ) -> Any:
        """Rank 0's result of the role's `method`, once all ranks have returned."""
        deadline = deadline or self.deadline
        return self.finish([rank.ask(method, *args, deadline=deadline, keywords=keywords) for rank in self.ranks])[0]

    def finish(self, calls: Sequence[Call]) -> list[Any]:
        try:
            return self.crew.results(calls)
        except RanksLostError:
            raise  # others take their seats
        except BaseException:
            # The other ranks may wait in a collective for the one that failed, and would never return.
            if len(self.ranks) > 1:
                self.crew.kill(self.ranks)
            raise
