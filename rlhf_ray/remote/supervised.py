"""A supervised run on Ray: the trainer's ranks as actors, and the handle that the loop talks to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from rlhf_ray.config.sections import RayConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.config.worker_env import Variables
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.cluster import connected, worker_environment
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.health import Limits
from rlhf_ray.remote.host import Host, Surroundings
from rlhf_ray.remote.hosts import RankHost
from rlhf_ray.remote.loading import Loading, Note, silent
from rlhf_ray.remote.placement import LEAST_CPUS, Placement, Seat, options_of, placed
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.remote.ranks import RankSteps, rank_steps
from rlhf_ray.remote.roles import everywhere
from rlhf_ray.remote.supervisor import Tell, untold
from rlhf_ray.roles.factory import Assets
from rlhf_ray.roles.supervised import SupervisedTrainer
from rlhf_ray.roles.supervised_factory import Splits, make_trainer

ROLE = "trainer"


class SupervisedHost(RankHost):
    """A rank of the trainer."""


@contextmanager
def open_remote_trainer(
    config: SupervisedConfig, assets: Assets, splits: Splits, note: Note = silent, tell: Tell = untold
) -> Iterator[SupervisedTrainer]:
    """Start `learner.world_size` ranks, and yield their handle; everything started here ends here.

    `note` hears what is being started, and who is waited for; `tell`, in another thread, of ranks that are lost and
    what is done about it.

    Raises:
        PlacementError: no cluster, or one that is too small.
        WorkerError, DeadlineError: a rank did not start; and from the handle later, naming the one that died or hangs.
        RanksLostError: from the handle: one was lost, and other processes take the seats of all.
        RlhfRayError: what the trainer refused when it was built, as it would locally.
    """
    variables = Variables.of(config.ray.env)
    device = assets.hardware.device
    plan = plan_ranks(config, device)
    with connected(config.ray.address, plan.total("CPU"), config.ray.start_deadline_s, note) as joining, placed(
        plan, config.ray.start_deadline_s, colocated=False, note=note, joining=joining
    ) as group:
        crew, farewell = Crew(Limits.of(config.ray), tell), []
        try:
            environment = worker_environment(config.ray.cpus_per_worker, device) | variables.shown
            around = Surroundings(os.getcwd(), variables.quiet)
            for seat in plan.seats:
                crew.hire(SupervisedHost, seat.name, options_of(seat, group, environment), around)
            make = partial(make_trainer, config, everywhere(assets))
            rows: Any = ray.put(dict(splits))  # once into the object store, however many ranks read it
            ranks = rank_steps(crew.named(ROLE), SupervisedHost.build, [make, rows], config.ray.call_deadline_s)
            _build(crew, ranks, config.learner.engine, config.ray, note)
            if config.ray.restarts:
                crew.built(ranks, together=[list(ranks)], holders=list(ranks))
            else:
                crew.built()
            nodes = len({worker.node for worker in crew.workers})
            deadline = Deadline(config.ray.call_deadline_s, "ray.call_deadline_s")
            trainer = proxy(SupervisedTrainer, Group(crew, crew.named(ROLE), deadline))
            trainer.rejoin = crew.rejoin
            trainer.devices = plan.total("GPU") if device == "cuda" else float(nodes)
            yield trainer
            farewell = [(worker, Host.shut_down) for worker in crew.workers]
        finally:
            crew.dismiss(farewell)


def plan_ranks(config: SupervisedConfig, device: str) -> Placement:
    """A bundle for every rank: on CUDA a GPU of its own."""
    cpus = max(config.ray.cpus_per_worker, LEAST_CPUS)
    gpus = config.ray.gpus_per_worker if device == "cuda" else 0.0
    return Placement([Seat(f"{ROLE} rank {i}", i, cpus, gpus) for i in range(config.learner.world_size)])


def _build(
    crew: Crew, ranks: Mapping[str, RankSteps], engine: str, workers: RayConfig, note: Note
) -> None:  # fmt: skip
    """Every rank loads the model and gets the rows, all at the same time."""
    until = time.monotonic() + workers.start_deadline_s

    def left() -> Deadline:
        return Deadline(max(1.0, until - time.monotonic()), "ray.start_deadline_s")

    note(f"starting {len(crew.workers)} workers")
    places = crew.locate(left())
    loading, calls = Loading(note, crew.workers, {ROLE: engine}), []
    for worker in crew.workers:
        calls += [worker.start(method, *args, deadline=left()) for method, args in ranks[worker.name](places)]
    crew.results(calls, loading.done)
