"""Actors without Ray: each host is a thread of this process, and everything between them is pickled and counted."""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.remote.calls import Call, Worker
from rlhf_ray.remote.health import State
from rlhf_ray.remote.hosts import GeneratorHost, LearnerHost, RoleHost
from rlhf_ray.roles.serving import WholeGroups

DRIVER = "driver"


class Ref:
    """One result of a call, where it was made. Pickles as a name: what it holds does not travel with it."""

    def __init__(self, owner: str, future: Future, index: int | None) -> None:
        self.owner, self.future, self.index = owner, future, index
        self.readers: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.owner,)

    def data(self) -> bytes:
        results = self.future.result(timeout=60)
        return results if self.index is None else results[self.index]


class InProcess:
    """Hosts of roles as workers, and the waiting that `Crew` does. `received`: bytes of objects by who was sent them;
    what already lies with its reader costs nothing, and the same object is sent once."""

    def __init__(self, choose: Callable[[int], int] = lambda calls: 0) -> None:
        """`choose`: of so many calls under way, which ends first; those of one worker end in their order."""
        self.choose = choose
        self.received: dict[str, int] = defaultdict(int)
        self.ends: list[ThreadPoolExecutor] = []
        self.workers: list[Worker] = []

    def hire(self, name: str, role: Any) -> Worker:
        kind = {"generator": GeneratorHost, "learner": LearnerHost}.get(name.split()[0], RoleHost)
        host = kind.__new__(kind)  # without the socket and the folder of an actor's process
        host.name, host.role = name, role
        if isinstance(host, GeneratorHost):
            host.groups = WholeGroups(role)
        self.workers.append(Worker(name, Actor(self, host)))
        return self.workers[-1]

    def named(self, prefix: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.name.split()[0] == prefix]

    def state(self, worker: Worker) -> State:
        return State.HEALTHY

    def check(self) -> None:
        """Nobody is ever lost."""

    def results(self, calls: Sequence[Call], done: Callable[[Call], None] = lambda call: None) -> list[Any]:
        return [self.taken(DRIVER, call.ref) for call in calls]

    def next_done(self, calls: Sequence[Call]) -> tuple[Call, Any]:
        first: dict[str, Call] = {}
        for call in calls:
            first.setdefault(call.worker.name, call)
        call = list(first.values())[self.choose(len(first))]
        return call, self.taken(DRIVER, call.ref)

    def taken(self, reader: str, ref: Ref) -> Any:
        data = ref.data()
        if reader not in {ref.owner} | ref.readers:
            ref.readers.add(reader)
            self.received[reader] += len(data)
        return pickle.loads(data)

    def close(self) -> None:
        for pool in self.ends:
            pool.shutdown()


class Actor:
    """Pickles as a handle: whoever unpickles it has the same actor."""

    handles: dict[int, Actor] = {}

    def __init__(self, world: InProcess, host: RoleHost) -> None:
        self.world, self.host = world, host
        self.handles[id(self)] = self
        # Slices are cut beside the work, as in the actors.
        self.pools = {True: ThreadPoolExecutor(1), False: ThreadPoolExecutor(1)}
        world.ends += self.pools.values()

    def __reduce__(self) -> tuple[Any, ...]:
        return _actor, (id(self),)

    def __getattr__(self, method: str) -> Method:
        return Method(self, method, {"write": 2, "compute": 2}.get(method, 1))


def _actor(handle: int) -> Actor:
    return Actor.handles[handle]


class Method:
    def __init__(self, actor: Actor, name: str, returns: int) -> None:
        self.actor, self.name, self.returns = actor, name, returns

    def options(self, num_returns: int) -> Method:
        return Method(self.actor, self.name, num_returns)

    def remote(self, *args: Any) -> Any:
        world, host = self.actor.world, self.actor.host
        world.received[f"{DRIVER}: sends"] += len(pickle.dumps([a for a in args if not isinstance(a, Ref)]))

        def run() -> Any:
            # Only references at the top level are resolved, as by Ray.
            given = [world.taken(host.name, a) if isinstance(a, Ref) else pickle.loads(pickle.dumps(a)) for a in args]
            result = getattr(host, self.name)(*given)
            return pickle.dumps(result) if self.returns == 1 else [pickle.dumps(part) for part in result]

        future = self.actor.pools[self.name == "cut"].submit(run)
        refs = [Ref(host.name, future, None if self.returns == 1 else i) for i in range(self.returns)]
        return refs[0] if self.returns == 1 else refs


class Ring:
    """Collectives of `world_size` threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.slots: list[Any] = [None] * world_size

    def all_reduce(self, rank: int, value: torch.Tensor, op: str) -> torch.Tensor:
        self.slots[rank] = value
        self.barrier.wait()
        stacked = torch.stack(list(self.slots))
        self.barrier.wait()
        return stacked.sum(0) if op == "sum" else stacked.amax(0)


class RingEngine(TorchEngine):
    """One of several ranks: gradients are added up over all of them, and every pass is counted."""

    def __init__(self, module: torch.nn.Module, ring: Ring, rank: int, **settings: Any) -> None:
        super().__init__(module, **settings)
        self.ring, self.rank, self.world_size = ring, rank, len(ring.slots)

    def all_reduce(self, value: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return self.ring.all_reduce(self.rank, value, op)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.ring.barrier.wait()  # a rank with fewer passes would break it
        super().backward(loss, last=last)

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> float:
        for master in self._masters:
            master.grad = self.all_reduce(torch.zeros_like(master) if master.grad is None else master.grad)
        return super().step(lr, scale)
