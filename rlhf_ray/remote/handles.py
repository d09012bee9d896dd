"""The roles as the loop sees them on Ray: typed, blocking, with deadlines. See `roles/protocols.py`.

A handle takes and returns `RemoteBatch` and `RemoteColumn` where the local role takes and returns tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from rlhf_ray.batch import Rows
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.remote.batch import RemoteBatch, RemoteColumn
from rlhf_ray.remote.batcher import BatchHost
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.host import Host
from rlhf_ray.remote.hosts import CriticHost, GeneratorHost, LearnerHost, ReferenceHost, RewardHost, TrainerHost
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.protocols import Request, Sampling, Scores

if TYPE_CHECKING:
    from ray import ObjectRef

Split = Callable[[Sequence[Request]], list[Sequence[Request]]]

REPORT_S = 30.0


class RemoteGenerator:
    """One generator by itself."""

    def __init__(self, crew: Crew, worker: Worker, deadline: Deadline) -> None:
        self.crew = crew
        self.worker = worker
        self.deadline = deadline

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        return self.crew.result(self.worker.start(method, *args, deadline=self.deadline))

    @property
    def version(self) -> int:
        return self._call(GeneratorHost.version)

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._call(GeneratorHost.logprobs, tokens)


class RemoteGenerators(GeneratorsClient):
    """All generators together as one `Generator`; the four weight calls are `GeneratorsClient`'s.

    Args:
        split: cuts a step's requests into pieces; where there are more than generators, an idle one takes the next.
        batcher: the worker that puts the pieces together.
        neighbours: who holds memory on the generators' GPUs (ray.colocate).
    """

    def __init__(
        self, crew: Crew, generators: Sequence[Worker], split: Split, batcher: Worker, *,
        workers_each: int, sync_deadline: Deadline, deadline: Deadline, neighbours: Sequence[Worker] = (),
    ) -> None:  # fmt: skip
        super().__init__(generators, workers_each=workers_each, deadline=sync_deadline)
        self.group = Group(crew, generators, deadline)
        self.replicas = tuple(RemoteGenerator(crew, worker, deadline) for worker in generators)
        self.split = split
        self.batcher = batcher
        self.neighbours = list(neighbours)

    @property
    def version(self) -> int:
        return min(replica.version for replica in self.replicas)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> RemoteBatch:
        pieces = self._pieces(self.split(requests), sampling)
        if len(pieces) == 1:
            return RemoteBatch(*pieces[0])
        refs, rows = zip(*pieces, strict=True)
        batch, call = self.batcher.start_keeping(BatchHost.concatenate, *refs, deadline=self.group.deadline)
        self.group.crew.result(call)
        return RemoteBatch(batch, Rows.cat(rows))

    def _pieces(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> list[tuple[ObjectRef, Rows]]:
        """(reference to a Batch, its rows) of each chunk, in order."""
        waiting, idle = deque(enumerate(chunks)), deque(self.generators)
        running: dict[Call, tuple[int, ObjectRef]] = {}
        pieces: dict[int, tuple[ObjectRef, Rows]] = {}
        while waiting or running:
            while waiting and idle:
                index, chunk = waiting.popleft()
                ref, call = idle.popleft().start_keeping(
                    GeneratorHost.generate, chunk, sampling, deadline=self.group.deadline
                )
                running[call] = (index, ref)
            call, rows = self.group.crew.next_done(list(running))
            index, ref = running.pop(call)
            pieces[index] = (ref, rows)
            idle.append(call.worker)
        return [pieces[index] for index in range(len(chunks))]

    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.replicas[0].logprobs(tokens)

    def sleep(self) -> None:
        self.group.call(GeneratorHost.sleep)

    def wake(self) -> None:
        # What another process has only cached is not free for this one.
        deadline = self.group.deadline
        self.group.crew.results([w.start(Host.release_memory, deadline=deadline) for w in self.neighbours])
        self.group.call(GeneratorHost.wake)

    def close(self) -> None:
        """Generators end with the run (`open_remote_roles`)."""


@dataclass(frozen=True)
class RemoteGather:
    """`batch.gather`, done by the worker that puts batches together."""

    crew: Crew
    batcher: Worker
    deadline: Deadline

    def __call__(self, parts: Sequence[tuple[RemoteBatch, Sequence[int]]]) -> RemoteBatch:
        chosen = [tuple(rows) for _, rows in parts]
        refs = [batch.ref for batch, _ in parts]
        ref, call = self.batcher.start_keeping(BatchHost.gather, chosen, *refs, deadline=self.deadline)
        self.crew.result(call)
        return RemoteBatch(ref, Rows.cat([batch.rows.select(rows) for batch, rows in parts]))


@dataclass(frozen=True)
class RemoteReward:
    crew: Crew
    worker: Worker
    deadline: Deadline

    def score(self, batch: RemoteBatch, texts: int = 0) -> Scores:
        return self.crew.result(self.worker.start(RewardHost.score, texts, *batch.arguments(), deadline=self.deadline))


@dataclass(frozen=True)
class RemoteReference:
    group: Group

    def logprobs(self, batch: RemoteBatch) -> RemoteColumn:
        return RemoteColumn(self.group.keep(ReferenceHost.logprobs, *batch.arguments()))


@dataclass(frozen=True)
class RemoteEstimate:
    """`roles.protocols.Estimate`, its columns by reference."""

    columns: dict[str, RemoteColumn]
    stats: dict[str, float]


class RemoteAdvantages:
    """The estimator's state, a few numbers, lives here on the driver; the tensors stay with the worker."""

    def __init__(self, crew: Crew, worker: Worker, algorithm: AlgorithmConfig, deadline: Deadline) -> None:
        self.crew = crew
        self.worker = worker
        self.algorithm = algorithm
        self.deadline = deadline
        self._state = AdvantageEstimator(algorithm).state_dict()

    def estimate(self, batch: RemoteBatch, kl_coef: float) -> RemoteEstimate:
        columns, call = self.worker.start_keeping(
            BatchHost.estimate, self.algorithm, self._state, kl_coef, *batch.arguments(), deadline=self.deadline
        )
        done = self.crew.result(call)
        self._state = done.state
        return RemoteEstimate({name: RemoteColumn(columns, name) for name in done.names}, dict(done.stats))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)


class RemoteTrainer:
    """What the handles of learner and critic share: the calls of the `TrainerHost` in both."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def save(self, folder: Path) -> None:
        self.group.call(TrainerHost.save, folder.resolve())

    def load(self, folder: Path) -> None:
        self.group.call(TrainerHost.load, folder.resolve())


class RemoteCritic(RemoteTrainer):
    def values(self, batch: RemoteBatch) -> RemoteColumn:
        return RemoteColumn(self.group.keep(CriticHost.values, *batch.arguments()))

    def update(self, batch: RemoteBatch, step: int) -> dict[str, float]:
        return self.group.call(CriticHost.update, step, *batch.arguments())


class RemoteLearner(RemoteTrainer):
    def __init__(self, group: Group, sync_deadline: Deadline) -> None:
        super().__init__(group)
        # The learner's own calls end by the sync's deadline; it needs a little longer to say which one did not.
        self.push_deadline = Deadline(sync_deadline.seconds + REPORT_S, sync_deadline.setting)
        # The loop asks for both columns at once, and all ranks must hear of them in the same order.
        self._turn = Lock()

    def logprobs(self, batch: RemoteBatch) -> RemoteColumn:
        with self._turn:
            return RemoteColumn(self.group.keep(LearnerHost.logprobs, *batch.arguments()))

    def reference_logprobs(self, batch: RemoteBatch) -> RemoteColumn:
        with self._turn:
            return RemoteColumn(self.group.keep(LearnerHost.reference_logprobs, *batch.arguments()))

    def update(self, batch: RemoteBatch, step: int, kl_coef: float) -> dict[str, float]:
        return self.group.call(LearnerHost.update, step, kl_coef, *batch.arguments())

    def push_weights(self, version: int) -> dict[str, float]:
        return self.group.call(LearnerHost.push_weights, version, deadline=self.push_deadline)

    def canary_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.group.call(LearnerHost.canary_logprobs, tokens)

    def export_model(self, folder: Path) -> None:
        self.group.call(LearnerHost.export_model, folder.resolve())

    def export_adapter(self, folder: Path) -> None:
        self.group.call(LearnerHost.export_adapter, folder.resolve())
