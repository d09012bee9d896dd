"""The generators as the loop sees them on Ray: one `Generator` that hands out groups one by one (remote/dispatch.py).

The other roles are proxies alone (`remote/proxy.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
from rlhf_ray.remote.successors import LOOK_AGAIN_S, Proof, Successors
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Generator, Request, Sampling
from rlhf_ray.roles.requests import Requests
from rlhf_ray.sync.canary import DEFAULT_BOUND

if TYPE_CHECKING:
    from ray import ObjectRef

OnWritten = Callable[[int, RemoteBatch], None]


class RemoteGenerators(GeneratorsClient):
    """All generators together as one `Generator`; the four weight calls are `GeneratorsClient`'s.

    Where another process takes the place of a lost one, the others go on meanwhile: only what nobody but that one can
    do waits for it.

    Args:
        rows: answers that each writes side by side.
        neighbours: who holds memory on the generators' GPUs (ray.colocate).
        learner: the rank that sends its weights to a process that takes the place of a lost one; None: no other takes
            it.
        bound: by how much the answers of two generators to the canary may differ, in nats.
    """

    def __init__(
        self, crew: Crew, generators: Sequence[Worker], rows: int, *,
        workers_each: int, sync_deadline: Deadline, deadline: Deadline, learner: Worker | None = None,
        bound: float = DEFAULT_BOUND["float32"], neighbours: Sequence[Worker] = (),
    ) -> None:  # fmt: skip
        super().__init__(generators, workers_each=workers_each, deadline=sync_deadline)
        self.group = Group(crew, generators, deadline)
        self.rows = rows
        self.neighbours = list(neighbours)
        self.successors = Successors(crew, learner, bound, deadline, sync_deadline)
        self.replicas = EachGenerator(self)
        self._turn = Lock()

    @property
    def version(self) -> int:
        return min(self._all_of(Generator.version.fget, self.there))

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
            try:
                _Writing(self, asked, sampling).run(written)
            except BaseException:
                # What is open would come out of the next call. Nobody waits for it: a generator may be lost.
                for worker in self.generators:
                    with contextlib.suppress(Exception):
                        worker.start(GeneratorHost.drop, deadline=self.group.deadline)
                raise
        return asked.batch(range(len(requests)))

    def _all_of(self, method: Callable[..., Any], asked: Callable[[], Sequence[Worker]]) -> list[Any]:
        """A call of each of these generators, which may be repeated."""
        late: set[Worker] = set()
        while True:
            calls = [worker.ask(method, deadline=self.group.deadline) for worker in asked()]
            try:
                return self.group.crew.results(calls)
            except GoneError as error:  # as often as the budget allows
                _allow_once_more(error, [error.call.worker], late)
                time.sleep(LOOK_AGAIN_S)

    def present(self) -> list[Worker]:
        """The generators but those that are lost, and whose successors have no weights yet."""
        absent = (State.DEAD, State.RESTARTING, State.STALE)
        return [worker for worker in self.generators if self.group.crew.state(worker) not in absent]

    def there(self) -> list[Worker]:
        """The same, once there is one."""
        while True:
            if found := self.present():
                return found
            self.group.crew.check()
            for worker in self.generators:
                if self.group.crew.state(worker) is State.STALE and self.successors.sync(worker):
                    return [worker]
            time.sleep(POLL_S)

    def answering(self) -> list[Worker]:
        """Those that are there and answer now: a loss that nobody has noticed yet is noticed."""
        self._all_of(Generator.version.fget, self.there)
        return self.there()

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.replicas[0].logprobs(tokens)

    # Who takes the place of a lost one is awake and has nothing open: nobody waits for it here.
    def sleep(self) -> None:
        self._all_of(Generator.sleep, self.present)

    def wake(self) -> None:
        # What another process has only cached is not free for this one.
        deadline = self.group.deadline
        self.group.crew.results([w.start(Host.release_memory, deadline=deadline) for w in self.neighbours])
        self._all_of(Generator.wake, self.present)

    def close(self) -> None:
        """Generators end with the run (`open_remote_roles`)."""


class EachGenerator(Sequence["OneGenerator"]):
    """Each generator that is there by itself, for the canary: who comes later is asked the same before it writes."""

    def __init__(self, generators: RemoteGenerators) -> None:
        self.generators = generators

    def __len__(self) -> int:
        return len(self.generators.answering())

    def __getitem__(self, index: Any) -> Any:
        return [OneGenerator(self.generators, worker) for worker in self.generators.answering()][index]

    def __iter__(self) -> Iterator[OneGenerator]:
        return iter(self[:])


class OneGenerator:
    """One generator. Where it is lost, its successor answers, once it has the weights."""

    def __init__(self, generators: RemoteGenerators, worker: Worker) -> None:
        self.generators = generators
        self.worker = worker

    @property
    def version(self) -> int:
        return self._ask((Generator.version.fget, ()))[0]

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        found, version = self._ask((Generator.logprobs, (tokens,)), (Generator.version.fget, ()))
        self.generators.successors.proof = Proof(version, tokens, found)
        return found

    def _ask(self, *wanted: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[Any]:
        group, late = self.generators.group, set()
        while True:
            while (state := group.crew.state(self.worker)) is not State.HEALTHY:
                group.crew.check()
                if not (state is State.STALE and self.generators.successors.sync(self.worker)):
                    time.sleep(POLL_S)
            calls = [self.worker.ask(method, *args, deadline=group.deadline) for method, args in wanted]
            try:
                return group.crew.results(calls)
            except GoneError as error:  # as often as the budget allows
                _allow_once_more(error, [self.worker], late)
                time.sleep(LOOK_AGAIN_S)


class _Writing:
    """The answers to some requests under way. Each generator has a call under way and one behind it, so that it never
    waits for this process.

    Attributes:
        calls: of each generator, under way, in order.
        gone: of each, the last that was lost.
        syncs: calls that send the weights, to those that take the place of lost ones.
        late: groups of one that was.
    """

    def __init__(self, generators: RemoteGenerators, asked: _Asked, sampling: Sampling) -> None:
        self.crew, self.workers, self.deadline = generators.group.crew, generators.generators, generators.group.deadline
        self.successors, self.asked, self.sampling = generators.successors, asked, sampling
        rows, count = [len(group) for group in asked.groups], len(self.workers)
        work = [asked.work(group, sampling.max_new_tokens) for group in asked.groups]
        self.least = handover(len(rows), count)
        # Beyond what it writes side by side, what may end before it hears of more. One that is alone hears of all.
        room = generators.rows + 2 * self.least * max(rows, default=0) if count > 1 else float("inf")
        self.dispatch = Dispatch(work, rows, count, room)
        self.calls: dict[int, list[Call]] = {worker: [] for worker in range(count)}
        self.gone: dict[int, Call] = {}
        self.syncs: dict[int, Call] = {}
        self.late: set[int] = set()

    def run(self, written: OnWritten) -> None:
        dispatch, asked = self.dispatch, self.asked
        for number, worker in enumerate(self.workers):
            if self.crew.state(worker) is not State.HEALTHY:
                dispatch.lost(number)
        while True:
            self._look_for_those_who_are_back()
            for number, groups in dispatch.assign().items():
                self._start(number, groups)
            for number, calls in self.calls.items():
                if dispatch.open.get(number) and len(calls) < 2:
                    self._start(number, ())
            for parcel in asked.whole_parcels():
                written(parcel, asked.batch(asked.parcels[parcel]))
            if dispatch.done:
                return  # a call that is still there finds nothing to do
            self._wait()

    def _start(self, number: int, groups: Sequence[int]) -> None:
        requests = self.asked.of_groups(groups)
        call = self.workers[number].start(
            GeneratorHost.write, requests, self.sampling, self.least, deadline=self.deadline
        )
        call.about(lambda: self.asked.prompts_of(self.dispatch.open.get(number, ())))  # all that it has open by then
        self.calls[number].append(call)

    def _wait(self) -> None:
        """For the next call that ends, and see to it."""
        under_way = [*(call for calls in self.calls.values() for call in calls), *self.syncs.values()]
        if not under_way:  # all are lost
            self.crew.check()
            time.sleep(POLL_S)
            return
        try:
            call, result = self.crew.next_done(under_way)
        except GoneError as error:
            number = next(number for number, calls in self.calls.items() if error.call in calls)
            self.gone[number] = error.call
            _allow_once_more(error, self.dispatch.lost(number), self.late)
            self.calls[number].clear()
            return
        number = next((number for number, sync in self.syncs.items() if sync is call), None)
        if number is not None:
            del self.syncs[number]
            if self.successors.end(self.workers[number], result):
                self._joined(number)
            return
        number = next(number for number, calls in self.calls.items() if call in calls)
        self.calls[number].remove(call)
        for next_call in self.calls[number]:
            next_call.renew()
        if result is not None:
            self.dispatch.ended(number, self.asked.add(self.workers[number], call.kept[0], result))

    def _look_for_those_who_are_back(self) -> None:
        """They were lost, or not there at first. Another process must hold the weights first; the same one, which was
        only out of reach, forgets what it had open, for that has gone to others."""
        for number, worker in enumerate(self.workers):
            if number in self.syncs or self.dispatch.open.get(number):
                continue
            gone, state = self.gone.get(number), self.crew.state(worker)
            if state is State.STALE:
                self.syncs[number] = self.successors.begin(worker)
            elif number not in self.dispatch.open and (
                self.crew.supervisor.ready(gone) if gone else state is State.HEALTHY
            ):
                worker.start(GeneratorHost.drop, deadline=self.deadline)
                self._joined(number)

    def _joined(self, number: int) -> None:
        self.dispatch.joined(number)
        self.calls[number].clear()  # of the process that was lost


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

    def prompts_of(self, groups: Sequence[int]) -> list[int]:
        """By prompt_id."""
        return [int(self.requests.prompt_id[self.groups[group].start]) for group in groups]

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
