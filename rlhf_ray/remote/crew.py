"""All actors of a run: started at once, watched, waited for, and killed together."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from rlhf_ray.errors import RlhfRayError, WorkerError
from rlhf_ray.remote.calls import FETCH_S, Call, Deadline, Process, Worker, death, next_done, results, silence, value_of
from rlhf_ray.remote.host import Host, Place

if TYPE_CHECKING:
    from ray import ObjectRef

PULSE_S = 5.0
# A live process answers even while it computes; one that says nothing for so long is stopped or stuck for good.
SILENCE_S = 35.0
# How long the cause of an error may take to show: a rank hears "connection closed" before Ray reports the death.
CAUSE_S = 5.0
FAREWELL = Deadline(10.0, "no setting")


@dataclass(frozen=True)
class Lost:
    """A worker that has died or hangs, and the error to raise, given what the run was doing."""

    worker: Worker
    error: Callable[[str], RlhfRayError]


class Crew:
    """Waits for calls, and meanwhile watches every worker, not only the one that was called.

    A worker that dies ends every wait within seconds, named, and one whose process has stopped within PULSE_S +
    SILENCE_S: also when the call under way is another worker's, which would wait for the lost one in a collective.
    Deaths are seen from `locate` on; silence counts from `built` on, for an import may block a process for minutes.
    A call that is stuck in a process that still answers is left to its own deadline.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self._lost: Lost | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._built_at = math.inf

    def hire(self, host: type[Host], name: str, options: dict[str, Any], folder: str) -> Worker:
        """Start an actor; returns before it runs."""
        remote = ray.remote(concurrency_groups={"watch": 1, "slices": 1})(host)
        # No restarts by Ray: a blank actor would answer with base weights, and a repeated update would count twice.
        actor = remote.options(max_restarts=0, max_task_retries=0, **options).remote(name, folder)
        worker = Worker(name, actor)
        self.workers.append(worker)
        return worker

    def locate(self, deadline: Deadline) -> dict[str, Place]:
        """Wait until every actor runs; afterwards each is known by node and pid, and watched. The key is the worker's
        name."""
        calls = [worker.start(Host.place, deadline=deadline) for worker in self.workers]
        places = dict(zip((worker.name for worker in self.workers), self.results(calls), strict=True))
        for worker in self.workers:
            worker.process = Process(worker.actor, places[worker.name].node, places[worker.name].pid)
        self._watcher = threading.Thread(target=self._watch, name="crew-watch", daemon=True)
        self._watcher.start()
        return places

    def built(self) -> None:
        """Everything is loaded: from now on, who says nothing for long is lost."""
        self._built_at = time.monotonic()

    def named(self, prefix: str) -> list[Worker]:
        """Workers of a role, in the order of hiring."""
        return [worker for worker in self.workers if worker.name.split()[0] == prefix]

    # ------------------------------------------------------------ waiting

    def results(self, calls: Sequence[Call], done: Callable[[Call], None] = lambda call: None) -> list[Any]:
        """The results of all calls, in order; `done` hears of each at once. The first failure raises."""
        try:
            return results(calls, self.check, done)
        except WorkerError as error:
            raise self._cause_of(error, calls) from None

    def result(self, call: Call) -> Any:
        return self.results([call])[0]

    def next_done(self, calls: Sequence[Call]) -> tuple[Call, Any]:
        """The first call that ends, and its result."""
        try:
            call = next_done(calls, self.check)
            return call, value_of(call)
        except WorkerError as error:
            raise self._cause_of(error, calls) from None

    def check(self, calls: Sequence[Call] = ()) -> None:
        """Raises if a worker has died or fallen silent."""
        if self._lost is None:
            return
        own = next((call for call in calls if call.worker.name == self._lost.worker.name), None)
        when = f"during {own.name}" if own else f"while the run waited for {calls[0]}" if calls else "between calls"
        raise self._lost.error(when)

    def _cause_of(self, error: WorkerError, calls: Sequence[Call]) -> RlhfRayError:
        """The death behind an error, if there is one: the error may be only what others noticed of it."""
        deadline = time.monotonic() + CAUSE_S
        while self._watcher is not None and self._lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._lost is None or str(self._lost.worker) in str(error):
            return error
        try:
            self.check(calls)
        except RlhfRayError as cause:
            return cause
        return error

    # ------------------------------------------------------------ watching

    def _watch(self) -> None:
        pulses: dict[ObjectRef, tuple[Worker, float]] = {}

        def feel(worker: Worker) -> None:
            pulses[worker.actor.pulse.remote(PULSE_S)] = (worker, time.monotonic())

        for worker in self.workers:
            feel(worker)
        while not self._closing.is_set():
            done, _ = ray.wait(list(pulses), num_returns=1, timeout=1.0)
            for ref in done:
                worker, _ = pulses.pop(ref)
                try:
                    ray.get(ref, timeout=FETCH_S)
                except RayError as error:
                    return self._lose(worker, partial(death, worker, error))
                feel(worker)
            now = time.monotonic()
            for worker, since in pulses.values():
                silent = now - max(since, self._built_at)
                if silent > PULSE_S + SILENCE_S:
                    return self._lose(worker, partial(silence, worker, silent))

    def _lose(self, worker: Worker, error: Callable[[str], RlhfRayError]) -> None:
        if not self._closing.is_set():
            self._lost = Lost(worker, error)

    # ------------------------------------------------------------ ending

    def dismiss(self, farewell: Sequence[tuple[Worker, Callable[..., Any]]] = ()) -> None:
        """Kill every actor. `farewell` methods are given a moment first; what they raise does not matter any more."""
        self._closing.set()
        with contextlib.suppress(Exception):
            calls = [worker.start(method, deadline=FAREWELL) for worker, method in farewell]
            ray.wait([call.ref for call in calls], num_returns=len(calls), timeout=FAREWELL.seconds)
        if self._watcher is not None:
            self._watcher.join()
        self.kill(self.workers)

    def kill(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor, no_restart=True)


class Group:
    """The ranks of one role. Every call goes to all of them, because every call is a collective."""

    def __init__(self, crew: Crew, ranks: Sequence[Worker], deadline: Deadline) -> None:
        self.crew = crew
        self.ranks = list(ranks)
        self.deadline = deadline

    def call(self, method: Callable[..., Any], *args: Any, deadline: Deadline | None = None) -> Any:
        """Rank 0's result of the role's `method`, once all ranks have returned."""
        return self.finish([rank.ask(method, *args, deadline=deadline or self.deadline) for rank in self.ranks])[0]

    def finish(self, calls: Sequence[Call]) -> list[Any]:
        try:
            return self.crew.results(calls)
        except BaseException:
            # The other ranks may wait in a collective for the one that failed, and would never return.
            if len(self.ranks) > 1:
                self.crew.kill(self.ranks)
            raise
