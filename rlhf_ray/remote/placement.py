"""Where each worker sits: bundles of a Ray placement group, counted before anything starts.

`plan_seats` and `check_fit` are pure. A bundle lies on one machine, so workers that need one another's memory
share a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.config.schema import GeneratorConfig, RunConfig, SyncConfig
from rlhf_ray.config.sections import RayConfig
from rlhf_ray.errors import PlacementError
from rlhf_ray.remote.loading import Note, silent

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# Ray refuses a bundle that asks for nothing.
LEAST_CPUS = 0.001
AT_ONCE_S = 2  # an idle cluster has made room by then


@dataclass(frozen=True)
class Seat:
    """One worker's place. `borrows` names the workers whose accelerators it shares instead of having its own."""

    name: str
    bundle: int
    cpus: float
    gpus: float = 0.0
    borrows: tuple[str, ...] = ()


@dataclass
class Placement:
    seats: list[Seat] = field(default_factory=list)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of each bundle."""
        totals: list[dict[str, float]] = [{} for _ in range(1 + max(seat.bundle for seat in self.seats))]
        for seat in self.seats:
            bundle = totals[seat.bundle]
            bundle["CPU"] = round(bundle.get("CPU", 0.0) + seat.cpus, 6)
            if seat.gpus:
                bundle["GPU"] = round(bundle.get("GPU", 0.0) + seat.gpus, 6)
        return totals

    @property
    def shared(self) -> bool:
        """Whether workers take turns on the same accelerators."""
        return any(seat.borrows for seat in self.seats)

    def total(self, resource: str) -> float:
        return round(sum(bundle.get(resource, 0.0) for bundle in self.bundles), 6)

    def by_role(self, resource: str) -> dict[str, float]:
        counts: dict[str, float] = {}
        for seat in self.seats:
            amount = seat.gpus if resource == "GPU" else seat.cpus
            role = seat.name.split()[0]
            if amount:
                counts[role] = round(counts.get(role, 0.0) + amount, 6)
        return counts


def choose_transport(sync: SyncConfig, generator: GeneratorConfig, workers: RayConfig, device: str) -> str:
    """sync.transport, `auto` resolved. What a placement cannot serve, config/checks.py has refused."""
    if sync.transport != "auto":
        return sync.transport
    if device != "cuda" or not generator.facts.receives_on_gpu:
        return "shared_memory"
    if workers.colocate:
        return "cuda_ipc"
    return "nccl" if workers.gpus_per_worker >= 1 else "shared_memory"


def plan_seats(config: RunConfig, device: str, transport: str) -> Placement:
    """A seat for every worker of this config.

    Separate: each worker has its own bundle; with shared_memory the generators and learner rank 0, which sends,
    have one bundle in common. Colocated on CUDA: each GPU belongs to a learner rank and the others borrow it; that
    their numbers fit has been checked with the config.
    """
    if device == "cuda" and config.ray.colocate:
        return _colocated(_roster(config), config.learner.world_size, config.generator.tensor_parallel, config.ray)
    cpus = max(config.ray.cpus_per_worker, LEAST_CPUS)
    gpus = config.ray.gpus_per_worker if device == "cuda" else 0.0
    placement, next_bundle = Placement(), 1
    for name, accelerators, _ in _roster(config):
        together = transport == "shared_memory" and (name == "learner rank 0" or name.startswith("generator"))
        bundle = 0 if together or name == "learner rank 0" else next_bundle
        next_bundle += bundle != 0
        placement.seats.append(Seat(name, bundle, cpus, gpus * accelerators))
    return placement


def _roster(config: RunConfig) -> list[tuple[str, int, int]]:
    """(name, accelerators, place within its role) of every worker."""
    generator, judge = config.generator, int(config.judging.needs_gpu)
    roster = [(f"learner rank {i}", 1, i) for i in range(config.learner.world_size)]
    roster += [(f"generator {i}", generator.tensor_parallel, i) for i in range(generator.count)]
    if config.uses_critic:
        roster += [(f"critic rank {i}", 1, i) for i in range(config.critic.world_size)]
    if config.holds_reference:
        names = _replicas("reference", config.reference.count, config.reference.world_size)
        roster += [(name, 1, i) for i, name in enumerate(names)]
    names = _replicas("reward", config.reward.count, config.reward.world_size)
    return [*roster, *((name, judge, i) for i, name in enumerate(names))]


def _replicas(role: str, count: int, ranks: int) -> list[str]:
    names = [f"{role} {i}" for i in range(count)] if count > 1 else [role]
    return [f"{name} rank {i}" for name in names for i in range(ranks)] if ranks > 1 else names


def _colocated(roster: Sequence[tuple[str, int, int]], ranks: int, each: int, workers: RayConfig) -> Placement:
    """`ranks` of the learner have a GPU; `each` of the generators borrows so many of these."""
    cpus, placement = max(workers.cpus_per_worker, LEAST_CPUS), Placement()
    for name, accelerators, number in roster:
        role = name.split()[0]
        first = number * each if role == "generator" else number
        owners = tuple(f"learner rank {first + i}" for i in range(accelerators))
        # A generator's GPUs must be those of one machine, hence of one bundle.
        bundle = min(first, ranks - 1) // each
        own = role == "learner"
        placement.seats.append(Seat(name, bundle, cpus, float(own), () if own else owners))
    return placement


def check_fit(placement: Placement, nodes: Sequence[Mapping[str, float]], colocated: bool) -> None:
    """Refuse what can never be placed. `nodes`: the resources of each machine. Raises PlacementError."""
    generates = "generator" in placement.by_role("CPU")  # a supervised run does not, and has nobody to share with
    fewer = "lower learner.world_size" + (", generator.count or generator.tensor_parallel" if generates else "")
    for resource, plural, remedies in (
        ("GPU", "GPUs", [
            fewer,
            *([] if colocated or not generates else ["set ray.colocate=true to share them"]), "or add machines",
        ]),
        ("CPU", "CPUs", ["lower ray.cpus_per_worker", "or add machines"]),
    ):  # fmt: skip
        need, has = placement.total(resource), sum(node.get(resource, 0.0) for node in nodes)
        remedy = ", ".join(remedies)
        if need > has + 1e-6:
            shares = ", ".join(f"{role} {count:g}" for role, count in placement.by_role(resource).items())
            raise PlacementError(f"ray: the run needs {need:g} {plural} ({shares}), the cluster has {has:g}; {remedy}")
        largest = max(bundle.get(resource, 0.0) for bundle in placement.bundles)
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if largest > most + 1e-6:
            raise PlacementError(
                f"ray: {largest:g} {plural} must lie on one machine, the largest has {most:g}; {remedy}"
            )


@contextmanager
def placed(
    placement: Placement, seconds: float, colocated: bool, note: Note = silent, *, joining: bool = False
) -> Iterator[PlacementGroup]:
    """Its placement group, removed at the end. `note` hears if others have to end first, or machines to join.

    Args:
        joining: machines may still join, as under Slurm, Kubernetes or Ray's autoscaler, which starts them for what the
            group asks. Without, a cluster that is too small is refused at once.
    Raises:
        PlacementError: it can never fit, or what it needs did not become free in time.
    """
    lacking = _lacking(placement, colocated)
    if lacking and not joining:
        raise lacking
    group = placement_group(placement.bundles, strategy="PACK")
    try:
        if not _ready(group, placement, seconds, colocated, note):
            within = f"within {seconds:.0f} s (ray.start_deadline_s)"
            if lacking := _lacking(placement, colocated):
                raise PlacementError(f"{lacking}; no more machines have joined {within}")
            raise PlacementError(
                f"ray: the cluster did not make room {within}: {_needed(placement)}; wait for other jobs to end, or "
                "make the run smaller"
            )
        yield group
    finally:
        remove_placement_group(group)


def _lacking(placement: Placement, colocated: bool) -> PlacementError | None:
    try:
        check_fit(placement, [node["Resources"] for node in ray.nodes() if node["Alive"]], colocated)
    except PlacementError as error:
        return error
    return None


def _ready(group: PlacementGroup, placement: Placement, seconds: float, colocated: bool, note: Note) -> bool:
    first = min(math.ceil(seconds), AT_ONCE_S)
    if group.wait(first):
        return True
    lacking = _lacking(placement, colocated)
    note(
        f"waiting for machines to join: {str(lacking).removeprefix('ray: ')}" if lacking
        else f"waiting for room in the cluster: {_needed(placement)}"
    )  # fmt: skip
    return group.wait(math.ceil(seconds) - first)


def _needed(placement: Placement) -> str:
    free = {name: round(ray.available_resources().get(name, 0.0), 3) for name in ("CPU", "GPU")}
    return (
        f"the run needs {placement.total('CPU'):g} CPUs and {placement.total('GPU'):g} GPUs, of which "
        f"{free['CPU']:g} and {free['GPU']:g} are free"
    )


def options_of(seat: Seat, group: PlacementGroup, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray's options of the actor that takes this seat."""
    return {
        "num_cpus": seat.cpus,
        "num_gpus": seat.gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle),
        "runtime_env": {"env_vars": dict(environment)},
    }
