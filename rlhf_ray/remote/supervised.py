"""A supervised run on Ray: the trainer's ranks as actors, and the handle that the loop talks to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.cluster import connected, worker_environment
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.failures import reported
from rlhf_ray.remote.handles import RemoteTrainer
from rlhf_ray.remote.host import Host
from rlhf_ray.remote.hosts import TrainerHost
from rlhf_ray.remote.loading import Loading, Note, silent
from rlhf_ray.remote.placement import LEAST_CPUS, Plan, Seat, options_of, placed
from rlhf_ray.remote.roles import everywhere
from rlhf_ray.roles.factory import Assets, Rank
from rlhf_ray.roles.supervised import ReferenceLogprobs, Report
from rlhf_ray.roles.supervised_factory import Splits, make_trainer

ROLE = "trainer"


class SupervisedHost(TrainerHost):
    @reported
    def build(self, config: SupervisedConfig, assets: Assets, rank: Rank, splits: Splits) -> None:
        self.rank = rank
        self.release_port()
        self.role = make_trainer(config, assets, splits, rank)

    @reported
    def step(self, rows: Sequence[int], lr: float) -> dict[str, float]:
        return self.role.step(rows, lr)

    @reported
    def evaluate(self, split: str, limit: int | None) -> Report:
        return self.role.evaluate(split, limit)

    @reported
    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return self.role.sample(prompts, max_new_tokens)

    @reported
    def reference_logprobs(
        self, path: str | None, batches: Sequence[Sequence[int]], sample: int | None
    ) -> ReferenceLogprobs:
        return self.role.reference_logprobs(path, batches, sample)

    @reported
    def set_reference(self, logprobs: ReferenceLogprobs) -> None:
        self.role.set_reference(logprobs)

    @reported
    def export_model(self, folder: Path) -> None:
        self.role.export_model(folder)

    @reported
    def export_adapter(self, folder: Path) -> None:
        self.role.export_adapter(folder)


class RemoteSupervisedTrainer(RemoteTrainer):
    """All ranks together, as the loop sees them."""

    def __init__(self, group: Group, devices: float) -> None:
        super().__init__(group)
        self.devices = devices

    def step(self, rows: Sequence[int], lr: float) -> dict[str, float]:
        return self.group.call(SupervisedHost.step, rows, lr)

    def evaluate(self, split: str, limit: int | None = None) -> Report:
        return self.group.call(SupervisedHost.evaluate, split, limit)

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return self.group.call(SupervisedHost.sample, prompts, max_new_tokens)

    def reference_logprobs(
        self, path: str | None = None, batches: Sequence[Sequence[int]] = (), sample: int | None = None
    ) -> ReferenceLogprobs:
        return self.group.call(SupervisedHost.reference_logprobs, path, batches, sample)

    def set_reference(self, logprobs: ReferenceLogprobs) -> None:
        self.group.call(SupervisedHost.set_reference, logprobs)

    def export_model(self, folder: Path) -> None:
        self.group.call(SupervisedHost.export_model, folder.resolve())

    def export_adapter(self, folder: Path) -> None:
        self.group.call(SupervisedHost.export_adapter, folder.resolve())


@contextmanager
def open_remote_trainer(
    config: SupervisedConfig, assets: Assets, splits: Splits, note: Note = silent
) -> Iterator[RemoteSupervisedTrainer]:
    """Start `learner.world_size` ranks, and yield their handle; everything started here ends here.

    `note` hears what is being started, and who is waited for.

    Raises:
        PlacementError: no cluster, or one that is too small.
        WorkerError, DeadlineError: a rank did not start; and from the handle later, naming the one that died or hangs.
        RlhfRayError: what the trainer refused when it was built, as it would locally.
    """
    device = assets.hardware.device
    plan = plan_ranks(config, device)
    with connected(config.ray.address, plan.total("CPU"), config.ray.start_deadline_s, note), placed(
        plan, config.ray.start_deadline_s, colocated=False, note=note
    ) as group:
        crew, farewell = Crew(), []
        try:
            environment = worker_environment(config, device)
            for seat in plan.seats:
                crew.hire(SupervisedHost, seat.name, options_of(seat, group, environment), os.getcwd())
            _build(crew, config, everywhere(assets), splits, note)
            crew.built()
            nodes = len({worker.node for worker in crew.workers})
            deadline = Deadline(config.ray.call_deadline_s, "ray.call_deadline_s")
            yield RemoteSupervisedTrainer(
                Group(crew, crew.named(ROLE), deadline), plan.total("GPU") if device == "cuda" else float(nodes)
            )
            farewell = [(worker, Host.shut_down) for worker in crew.workers]
        finally:
            crew.dismiss(farewell)


def plan_ranks(config: SupervisedConfig, device: str) -> Plan:
    """A bundle for every rank: on CUDA a GPU of its own."""
    cpus = max(config.ray.cpus_per_worker, LEAST_CPUS)
    gpus = config.ray.gpus_per_worker if device == "cuda" else 0.0
    return Plan([Seat(f"{ROLE} rank {i}", i, cpus, gpus) for i in range(config.learner.world_size)])


def _build(crew: Crew, config: SupervisedConfig, assets: Assets, splits: Splits, note: Note) -> None:
    """Every rank loads the model and gets the rows, all at the same time."""
    until = time.monotonic() + config.ray.start_deadline_s

    def left() -> Deadline:
        return Deadline(max(1.0, until - time.monotonic()), "ray.start_deadline_s")

    note(f"starting {len(crew.workers)} workers")
    places = crew.locate(left())
    ranks = crew.named(ROLE)
    loading = Loading(note, ranks, {ROLE: config.learner.engine})
    first = places[ranks[0].name]
    rows: Any = ray.put(dict(splits))  # once into the object store, however many ranks read it
    calls = [
        worker.start(
            SupervisedHost.build, config, assets, Rank(number, len(ranks), first.node, first.port), rows,
            deadline=left(),
        )
        for number, worker in enumerate(ranks)
    ]  # fmt: skip
    crew.results(calls, loading.done)
