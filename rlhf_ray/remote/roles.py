"""The roles of a run on Ray: the twin of `start.rl.open_roles`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import RayConfig
from rlhf_ray.config.worker_env import Variables
from rlhf_ray.remote.batch import gather_remote
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.client import GeneratorsClient
from rlhf_ray.remote.cluster import accelerator_name, connected, worker_environment
from rlhf_ray.remote.crew import Crew, Group
from rlhf_ray.remote.given import require_portable
from rlhf_ray.remote.handles import RemoteGenerators
from rlhf_ray.remote.health import Limits
from rlhf_ray.remote.host import Host, Place, Surroundings
from rlhf_ray.remote.hosts import CriticHost, GeneratorHost, LearnerHost, ReferenceHost, RewardHost, RoleHost
from rlhf_ray.remote.loading import Loading, Note, silent
from rlhf_ray.remote.placement import Placement, choose_transport, options_of, placed, plan_seats
from rlhf_ray.remote.processes import Step
from rlhf_ray.remote.proxy import proxy
from rlhf_ray.remote.ranks import RankSteps, rank_steps
from rlhf_ray.remote.replicas import Replicas
from rlhf_ray.remote.store import RemoteStore
from rlhf_ray.remote.supervisor import Tell, untold
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.factory import Assets
from rlhf_ray.roles.makers import Makers
from rlhf_ray.roles.protocols import Critic, Generator, Learner, Reference, Reward, Roles
from rlhf_ray.roles.reference import AdapterFreeReference
from rlhf_ray.roles.sft_term import SFTRows
from rlhf_ray.sync.canary import DEFAULT_BOUND

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

HOSTS: dict[str, type[RoleHost]] = {
    "learner": LearnerHost,
    "generator": GeneratorHost,
    "critic": CriticHost,
    "reference": ReferenceHost,
    "reward": RewardHost,
}
# They give the same answer to the same call, whoever is asked: a lost one is replaced, and the call goes out again.
STATELESS = ("reference", "reward")
LEARNING = ("learner", "critic")
# The learner's own calls end by the sync's deadline; it needs a little longer to say which one did not.
REPORT_S = 30.0


@contextmanager
def open_remote_roles(
    config: RunConfig, assets: Assets, sft: SFTRows | None = None, note: Note = silent, tell: Tell = untold
) -> Iterator[Roles]:
    """Start the workers this config asks for, and yield their handles; everything started here ends here.

    `note` hears what is being started, and who is waited for; `tell`, in another thread, of workers that are lost and
    what is done about it.

    Raises:
        PlacementError: no cluster, or one that is too small.
        WorkerError, DeadlineError: a worker did not start; and from any handle later, naming the worker that
            died or hangs.
        RlhfRayError: what a role refused when it was built, as it would locally.
    """
    require_portable(config.rewards)
    variables = Variables.of(config.ray.env)
    device = assets.hardware.device
    bound = config.sync.canary_bound or DEFAULT_BOUND[str(assets.hardware.dtype).removeprefix("torch.")]
    transport = choose_transport(config.sync, config.generator, config.ray, device)
    plan = plan_seats(config, device, transport)
    with connected(config.ray.address, plan.total("CPU"), config.ray.start_deadline_s, note) as joining, placed(
        plan, config.ray.start_deadline_s, config.ray.colocate, note, joining=joining
    ) as group:
        crew, farewell = Crew(Limits.of(config.ray), tell), []
        try:
            environment = worker_environment(config.ray.cpus_per_worker, device) | variables.shown
            _hire(crew, plan, group, environment, Surroundings(os.getcwd(), variables.quiet))
            # Where weights go by way of the host's memory, they can be sent once more, to one alone.
            replaced = transport == "shared_memory" and not plan.shared and config.ray.restarts > 0
            makers = Makers.of(config, everywhere(assets), transport, keep=replaced)
            engines = {role: getattr(config, role).engine for role in ("generator", "learner", "critic")}
            ranks = _rank_steps(crew, makers, sft, config)
            lent = _build(crew, plan, makers, engines, config.ray, ranks, note)
            connect = partial(_connect, crew, config, replaced)
            connect()
            receivers = [worker.name for worker in crew.named("generator") if replaced]
            # What those that learn hold is in the checkpoints alone, to which all go back together: all are restarted
            # together. On shared GPUs there is no room for a rank while a generator is awake.
            gone_for_good = plan.shared or not config.ray.restarts
            holders = [] if gone_for_good else [worker.name for role in LEARNING for worker in crew.named(role)]
            together = [holders, *(
                [worker.name for worker in group] for role in STATELESS for group in _groups(crew, role, config)
            )]  # fmt: skip
            crew.built(_loads(crew, ranks, lent) | {
                name: [(GeneratorHost.build, (makers.generator,))] for name in receivers
            } | {name: ranks[name] for name in holders}, receivers, together, holders)  # fmt: skip

            roles = _handles(crew, plan, config, bound)

            def rejoin() -> dict[str, float]:
                seconds = crew.rejoin()
                connect()
                roles.generator.successors.proof = None  # versions that have been there come again, with other weights
                return seconds

            yield dataclasses.replace(roles, rejoin=rejoin, **_devices(crew, plan, device))
            farewell = [(w, Host.shut_down) for w in crew.workers]
        finally:
            crew.dismiss(farewell)


def everywhere(assets: Assets) -> Assets:
    """Folders as absolute paths: a worker may have started elsewhere."""
    paths = {name: getattr(assets, name) for name in ("policy", "tokenizer")}
    return dataclasses.replace(assets, **{
        name: str(Path(path).resolve()) if Path(path).is_dir() else path for name, path in paths.items()
    })  # fmt: skip


def _hire(
    crew: Crew, plan: Placement, group: PlacementGroup, environment: Mapping[str, str], around: Surroundings
) -> None:  # fmt: skip
    for seat in plan.seats:
        crew.hire(HOSTS[seat.name.split()[0]], seat.name, options_of(seat, group, environment), around)


def _groups(crew: Crew, role: str, config: RunConfig) -> list[list[Worker]]:
    """The workers of a role that load one model together: all ranks that learn, or those of each replica."""
    workers = crew.named(role)
    size = getattr(config, role).world_size
    return [workers[i : i + size] for i in range(0, len(workers), size)]


def _rank_steps(crew: Crew, makers: Makers, sft: SFTRows | None, config: RunConfig) -> dict[str, RankSteps]:
    """What everybody but the generators must do before it can take its seat."""
    rows: Any = ray.put(sft)  # once into the object store, however many ranks read it
    found: dict[str, RankSteps] = {}
    for role in (*LEARNING, *STATELESS):
        given = [getattr(makers, role), *([rows] if role == "learner" else [])]
        for group in _groups(crew, role, config):
            found |= rank_steps(group, HOSTS[role].build, given, config.ray.call_deadline_s)
    return found


def _build(
    crew: Crew, plan: Placement, makers: Makers, engines: Mapping[str, str], workers: RayConfig,
    ranks: Mapping[str, RankSteps], note: Note,
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    """Load every model, all at the same time; on shared GPUs the generators first.

    `engines`: role -> its engine. `ranks`: what each of them must do.

    Returns the GPUs of workers that have none of their own.
    """
    until = time.monotonic() + workers.start_deadline_s

    def left() -> Deadline:
        return Deadline(max(1.0, until - time.monotonic()), "ray.start_deadline_s")

    def start(role: str, make: Callable[[], Any] | None) -> list[Call]:
        return [worker.start(HOSTS[role].build, make, deadline=left()) for worker in crew.named(role)]

    note(f"starting {len(crew.workers)} workers")
    places = crew.locate(left())
    lent = _lend_gpus(crew, plan, places, left())
    loading = Loading(note, crew.workers, engines)
    calls = start("generator", makers.generator)
    if plan.shared:
        # vLLM measures what is free and takes its share of it, so it must be alone; then it lies down until the sync.
        crew.results(calls, loading.done)
        calls = [worker.ask(Generator.sleep, deadline=left()) for worker in crew.named("generator")]
        crew.results(calls)
    for worker in [worker for role in (*LEARNING, *STATELESS) for worker in crew.named(role)]:
        calls += [worker.start(method, *args, deadline=left()) for method, args in ranks[worker.name](places)]
    crew.results(calls, loading.done)
    return lent


def _loads(
    crew: Crew, ranks: Mapping[str, RankSteps], lent: Mapping[str, tuple[str, ...]]
) -> dict[str, RankSteps]:
    """What a process must do that takes the seat of a lost one, for the roles that hold nothing but what they load."""

    def steps(name: str, places: Mapping[str, Place]) -> list[Step]:
        borrows = [(Host.use_gpus, (lent[name],))] if name in lent else []
        return [*borrows, *ranks[name](places)]

    return {worker.name: partial(steps, worker.name) for role in STATELESS for worker in crew.named(role)}


def _connect(crew: Crew, config: RunConfig, replaced: bool) -> None:
    """Tell the learner whom it sends its weights to. `replaced`: see `GeneratorsClient`."""
    client = GeneratorsClient(
        crew.named("generator"), workers_each=config.generator.tensor_parallel,
        deadline=Deadline(config.sync.deadline_s, "sync.deadline_s"), replaced=replaced,
    )  # fmt: skip
    start = Deadline(config.ray.start_deadline_s, "ray.start_deadline_s")
    crew.results([worker.ask(Learner.connect, client, deadline=start) for worker in crew.named("learner")])


def _lend_gpus(
    crew: Crew, plan: Placement, places: Mapping[str, Place], deadline: Deadline
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    lent = {
        seat.name: tuple(gpu for owner in seat.borrows for gpu in places[owner].gpus)
        for seat in plan.seats
        if seat.borrows
    }
    crew.results([
        worker.start(Host.use_gpus, lent[worker.name], deadline=deadline)
        for worker in crew.workers
        if worker.name in lent
    ])
    return lent


def _devices(crew: Crew, plan: Placement, device: str) -> dict[str, Any]:
    """What the run occupies, as `Roles` has it."""
    if device == "cuda":
        return {"devices": plan.total("GPU"), "device_name": accelerator_name()}
    return {"devices": float(len({worker.node for worker in crew.workers})), "device_name": device}


def _handles(crew: Crew, plan: Placement, config: RunConfig, bound: float = DEFAULT_BOUND["float32"]) -> Roles:
    """`bound`: of the canary."""
    deadline = Deadline(config.ray.call_deadline_s, "ray.call_deadline_s")

    def group(role: str) -> Group:
        return Group(crew, crew.named(role), deadline)

    def replicas(role: str) -> Replicas:
        return Replicas(crew, _groups(crew, role, config), deadline)

    pushing = Deadline(config.sync.deadline_s + REPORT_S, "sync.deadline_s")
    learner = proxy(Learner, group("learner"), divides=True, deadlines={"push_weights": pushing})
    generators = RemoteGenerators(
        crew, crew.named("generator"), config.generator.rows, workers_each=config.generator.tensor_parallel,
        sync_deadline=pushing, deadline=deadline, learner=crew.named("learner")[0],
        bound=bound,
        neighbours=[worker for worker in crew.workers if plan.shared and not worker.name.startswith("generator")],
    )  # fmt: skip
    critic = proxy(Critic, group("critic"), divides=True) if config.uses_critic else None
    reference = AdapterFreeReference(learner)
    if config.holds_reference:
        reference = proxy(Reference, replicas("reference"), divides=True)
    return Roles(
        generator=generators,
        reward=proxy(Reward, replicas("reward")),
        learner=learner,
        advantages=AdvantageEstimator(config.algorithm, critic or learner),
        reference=reference if config.uses_reference else None,
        critic=critic,
        replicas=generators.replicas,
        gather=gather_remote,
        store=RemoteStore(crew, crew.named("generator")[0], deadline),
        judges=config.reward.count,
        early_rewards=not plan.shared,  # on shared GPUs the judges have no memory while a generator is awake
        parallel=True,
    )
