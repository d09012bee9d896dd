"""The generators as the loop sees them on Ray: one `Generator` that hands out groups one by one (remote/dispatch.py).

The other roles are proxies alone (`remote/proxy.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.errors import DataError
from rlhf_ray.remote.batch import Part, RemoteBatch
from rlhf_ray.remote.calls import POLL_S, Call, Deadline, Worker
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.crew import Crew, GoneError, Group
from rlhf_ray.remote.dispatch import Dispatch, handover
from rlhf_ray.remote.health import State
from rlhf_ray.remote.host import Host
from rlhf_ray.remote.hosts import GeneratorHost, Written
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Generator, Learner, Request, Sampling
from rlhf_ray.roles.requests import Requests

if TYPE_CHECKING:
    from ray import ObjectRef

OnWritten = Callable[[int, RemoteBatch], None]


class RemoteGenerators(GeneratorsClient):
    """All generators together as one `Generator`; the four weight calls are `GeneratorsClient`'s.

    Args:
        rows: answers that each writes side by side.
        neighbours: who holds memory on the generators' GPUs (ray.colocate).
        learner: who sends its weights to a process that takes the place of a lost one; None: no other takes it.
    """

    def __init__(
        self, crew: Crew, generators: Sequence[Worker], rows: int, *,
        workers_each: int, sync_deadline: Deadline, deadline: Deadline, learner: Learner | None = None,
        neighbours: Sequence[Worker] = (),
    ) -> None:  # fmt: skip
        super().__init__(generators, workers_each=workers_each, deadline=sync_deadline)
        self.group = Group(crew, generators, deadline)
        self.replicas = tuple(proxy(Generator, Group(crew, [worker], deadline)) for worker in generators)
        self.rows = rows
        self.neighbours = list(neighbours)
        self.learner = learner
        self._turn = Lock()

    @property
    def version(self) -> int:
        return min(self._all_of(Generator.version.fget))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> RemoteBatch:
        """What the prompts say beside their tokens stays here, for those who judge the answers."""
        return self.generate_parcels(requests, sampling, (), lambda parcel, batch: None)

    def generate_parcels(
        self, requests: Sequence[Request], sampling: Sampling, parcels: Sequence[range], written: OnWritten
    ) -> RemoteBatch:
        """See `roles.protocols.ParcelGenerator`. One call after the other, for an engine does not know whose requests
        are whose."""
        asked = _Asked(Requests.of(requests), parcels)
        with self._turn:
            self._wait_for_all()
            try:
                self._write(asked, sampling, written)
            except BaseException:
                # What is open would come out of the next call. Nobody waits for it: a generator may be lost.
                for worker in self.generators:
                    with contextlib.suppress(Exception):
                        worker.start(GeneratorHost.drop, deadline=self.group.deadline)
                raise
        return asked.batch(range(len(requests)))

    def _write(self, asked: _Asked, sampling: Sampling, written: OnWritten) -> None:
        """Each generator has a call under way and one behind it, so that it never waits for this process."""
        rows, workers = [len(group) for group in asked.groups], range(len(self.generators))
        work = [asked.work(group, sampling.max_new_tokens) for group in asked.groups]
        least = handover(len(rows), len(workers))
        # Beyond what it writes side by side, what may end before it hears of more. One that is alone hears of all.
        room = self.rows + 2 * least * max(rows, default=0) if len(workers) > 1 else float("inf")
        dispatch = Dispatch(work, rows, len(workers), room)
        calls: dict[int, list[Call]] = {worker: [] for worker in workers}  # under way, in order
        gone: dict[int, Call] = {}  # of each, the last that was lost
        late: set[int] = set()  # groups of one that was

        def start(worker: int, groups: Sequence[int]) -> None:
            seat, requests = self.generators[worker], asked.of_groups(groups)
            call = seat.start(GeneratorHost.write, requests, sampling, least, deadline=self.group.deadline)
            calls[worker].append(call)

        while True:
            for worker in workers:
                if self._is_back(worker, dispatch, gone.get(worker)):
                    calls[worker].clear()  # of the process that was lost
            for worker, groups in dispatch.assign().items():
                start(worker, groups)
            for worker in workers:
                if dispatch.open.get(worker) and len(calls[worker]) < 2:
                    start(worker, ())
            for parcel in asked.whole_parcels():
                written(parcel, asked.batch(asked.parcels[parcel]))
            if dispatch.done:
                return  # a call that is still there finds nothing to do
            under_way = [call for of_worker in calls.values() for call in of_worker]
            if not under_way:  # all are lost
                self.group.crew.check()
                time.sleep(POLL_S)
                continue
            try:
                call, ended = self.group.crew.next_done(under_way)
            except GoneError as error:
                worker = next(worker for worker in workers if error.call in calls[worker])
                gone[worker] = error.call
                _allow_once_more(error, dispatch.lost(worker), late)
                calls[worker].clear()
                continue
            worker = next(worker for worker in workers if call in calls[worker])
            calls[worker].remove(call)
            for next_call in calls[worker]:
                next_call.renew()
            if ended is not None:
                dispatch.ended(worker, asked.add(self.generators[worker], call.kept[0], ended))

    def _is_back(self, number: int, dispatch: Dispatch, gone: Call | None) -> bool:
        """Whether one that was lost can write again. Another process must hold the weights first; the same one, which
        was only out of reach, forgets what it had open, for that has gone to others."""
        worker, crew = self.generators[number], self.group.crew
        if crew.state(worker) is State.STALE and not dispatch.open.get(number):
            self._sync(worker)
        elif number not in dispatch.open and crew.supervisor.ready(gone):
            worker.start(GeneratorHost.drop, deadline=self.group.deadline)
        else:
            return False
        dispatch.joined(number)
        return True

    def _sync(self, worker: Worker) -> None:
        """Send the weights that the others hold to one alone; the next push goes to all again."""
        alone, everybody = (
            GeneratorsClient(generators, workers_each=self.workers_each, deadline=self.deadline)
            for generators in ([worker], self.generators)
        )
        self.learner.connect(alone)
        self.learner.push_weights(self.learner.version)
        self.learner.connect(everybody)
        self.group.crew.synced(worker)

    def _all_of(self, method: Callable[..., Any]) -> list[Any]:
        """A call of every generator that may be repeated, once each seat is taken."""
        late: set[Worker] = set()
        while True:
            self._wait_for_all()
            calls = [worker.ask(method, deadline=self.group.deadline) for worker in self.generators]
            try:
                return self.group.crew.results(calls)
            except GoneError as error:  # as often as the budget allows
                _allow_once_more(error, [error.call.worker], late)

    def _wait_for_all(self) -> None:
        """Until each seat is taken by a process that can write."""
        for worker in self.generators:
            while (state := self.group.crew.state(worker)) is not State.HEALTHY:
                self.group.crew.check()
                if state is State.STALE:
                    self._sync(worker)
                time.sleep(POLL_S)

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.replicas[0].logprobs(tokens)

    def sleep(self) -> None:
        self._all_of(Generator.sleep)

    def wake(self) -> None:
        # What another process has only cached is not free for this one.
        deadline = self.group.deadline
        self.group.crew.results([w.start(Host.release_memory, deadline=deadline) for w in self.neighbours])
        self._all_of(Generator.wake)

    def close(self) -> None:
        """Generators end with the run (`open_remote_roles`)."""


def _allow_once_more(error: GoneError, work: Collection[Any], late: set[Any]) -> None:
    """Raises where some of the work was late before, in another call: not that process was stuck, the work is too much.
    `late`: gets what is late now."""
    if error.call.late:
        if not late.isdisjoint(work):
            raise error.__cause__
        late.update(work)


class _Asked:
    """What is known of the answers to these requests so far, and who holds them. `parcels`: ranges of them."""

    def __init__(self, requests: Requests, parcels: Sequence[range]) -> None:
        self.requests, self.parcels = requests, parcels
        starts = [0, *(1 + np.flatnonzero(np.diff(requests.prompt_id))).tolist()] if len(requests) else []
        # Rows of requests that ask the same prompt, side by side.
        self.groups = [range(start, end) for start, end in zip(starts, [*starts[1:], len(requests)], strict=True)]
        self._group = np.repeat(np.arange(len(self.groups)), [len(group) for group in self.groups])
        self._by_id = np.argsort(requests.sample_id)  # rows in the order of their sample_ids
        self._ids = requests.sample_id[self._by_id]
        if (np.diff(self._ids) == 0).any():
            raise DataError("generate: two requests have the same sample_id; give each its own")
        self._without_texts = requests.without_texts()
        self._parts: list[Part] = []
        self._missing = [len(rows) for rows in parcels]  # rows of each that have not ended
        self._left = list(range(len(parcels)))
        self._rows = Rows.empty(len(requests))  # filled as they end

    def work(self, group: range, new_tokens: int) -> int:
        """Tokens that the group may cost: its prompt once, and its answers at their longest."""
        given = sum(row in self.requests.answers for row in group) if self.requests.answers else 0
        return len(self.requests.tokens[self.requests.prompt[group.start]]) + (len(group) - given) * new_tokens

    def of_groups(self, groups: Sequence[int]) -> Requests:
        """What a generator is told of these groups."""
        rows = [np.arange(self.groups[group].start, self.groups[group].stop) for group in groups]
        return self._without_texts.select(np.concatenate([np.arange(0), *rows]))

    def add(self, worker: Worker, ref: ObjectRef, written: Written) -> list[int]:
        """What a generator has written, as the object behind `ref`. Returns the groups that ended."""
        row_N = self._by_id[np.searchsorted(self._ids, written.sample_ids)]
        self._parts.append(Part(worker, ref, np.arange(len(row_N)), row_N))
        for parcel, own in enumerate(self.parcels):
            self._missing[parcel] -= int(((row_N >= own.start) & (row_N < own.stop)).sum())
        for name, column in vars(self._rows).items():
            column[row_N] = getattr(written.rows, name)
        return np.unique(self._group[row_N]).tolist()

    def whole_parcels(self) -> list[int]:
        """Those that have become whole since the last time."""
        whole = [parcel for parcel in self._left if not self._missing[parcel]]
        self._left = [parcel for parcel in self._left if self._missing[parcel]]
        return whole

    def batch(self, rows: range) -> RemoteBatch:
        """These rows, all of which have ended."""
        parts = []
        for part in self._parts:
            own = (part.rows >= rows.start) & (part.rows < rows.stop)
            if own.any():
                parts.append(Part(part.worker, part.ref, part.places[own], part.rows[own] - rows.start))
        known = Rows(**{name: column[rows.start : rows.stop] for name, column in vars(self._rows).items()})
        return RemoteBatch(tuple(parts), known, self.requests[rows.start : rows.stop].texts_by_id)
