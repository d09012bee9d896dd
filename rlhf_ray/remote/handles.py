"""The generators as the loop sees them on Ray: one `Generator` to which requests go in pieces.

The other roles are proxies alone (`remote/proxy.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.remote.batch import Part, RemoteBatch
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.host import Host
from rlhf_ray.remote.hosts import GeneratorHost
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Generator, Request, Sampling
from rlhf_ray.roles.requests import Requests

if TYPE_CHECKING:
    from ray import ObjectRef

Split = Callable[[Requests], list[Requests]]


class RemoteGenerators(GeneratorsClient):
    """All generators together as one `Generator`; the four weight calls are `GeneratorsClient`'s.

    Args:
        split: cuts a step's requests into pieces; where there are more than generators, an idle one takes the next.
        neighbours: who holds memory on the generators' GPUs (ray.colocate).
    """

    def __init__(
        self, crew: Crew, generators: Sequence[Worker], split: Split, *,
        workers_each: int, sync_deadline: Deadline, deadline: Deadline, neighbours: Sequence[Worker] = (),
    ) -> None:  # fmt: skip
        super().__init__(generators, workers_each=workers_each, deadline=sync_deadline)
        self.group = Group(crew, generators, deadline)
        self.replicas = tuple(proxy(Generator, Group(crew, [worker], deadline)) for worker in generators)
        self.split = split
        self.neighbours = list(neighbours)

    @property
    def version(self) -> int:
        return min(replica.version for replica in self.replicas)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> RemoteBatch:
        """What the prompts say beside their tokens stays here, for those who judge the answers."""
        requests = Requests.of(requests)
        parts, rows, start = [], [], 0
        for worker, ref, found in self._pieces(self.split(requests.without_texts()), sampling):
            places = np.arange(len(found))
            parts.append(Part(worker, ref, places, start + places))
            rows.append(found)
            start += len(found)
        return RemoteBatch(tuple(parts), Rows.cat(rows), requests.texts_by_id)

    def _pieces(
        self, chunks: Sequence[Requests], sampling: Sampling
    ) -> list[tuple[Worker, ObjectRef, Rows]]:
        """(who wrote it, reference to a Packed, its rows) of each chunk, in order."""
        waiting, idle = deque(enumerate(chunks)), deque(self.generators)
        running: dict[Call, int] = {}
        pieces: dict[int, tuple[Worker, ObjectRef, Rows]] = {}
        while waiting or running:
            while waiting and idle:
                index, chunk = waiting.popleft()
                call = idle.popleft().start(
                    GeneratorHost.generate, chunk, sampling, deadline=self.group.deadline
                )
                running[call] = index
            call, rows = self.group.crew.next_done(list(running))
            pieces[running.pop(call)] = (call.worker, call.kept[0], rows)
            idle.append(call.worker)
        return [pieces[index] for index in range(len(chunks))]

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.replicas[0].logprobs(tokens)

    def sleep(self) -> None:
        self.group.call(Generator.sleep)

    def wake(self) -> None:
        # What another process has only cached is not free for this one.
        deadline = self.group.deadline
        self.group.crew.results([w.start(Host.release_memory, deadline=deadline) for w in self.neighbours])
        self.group.call(Generator.wake)

    def close(self) -> None:
        """Generators end with the run (`open_remote_roles`)."""
