"""The actors in the seats of a run: hired, felt for signs of life, replaced. A `supervisor.World`."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from rlhf_ray.remote.calls import FETCH_S, Process, Worker
from rlhf_ray.remote.host import Host, Place, Surroundings
from rlhf_ray.remote.supervisor import Sign

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

# What cannot be reached fails at once; asking it again at once would keep a core busy.
ASK_AGAIN_S = 1.0

# A method of a host and its arguments
Step = tuple[Callable[..., Any], Sequence[Any]]
# What a process must do before it can take a seat; of ranks that meet it depends on where they are.
Steps = Sequence[Step] | Callable[[Mapping[str, Place]], Sequence[Step]]


@dataclass(frozen=True)
class Recipe:
    """How to hire who takes a seat."""

    host: type[Host]
    options: Mapping[str, Any]
    around: Surroundings


@dataclass
class Loading:
    """A process that is on its way into a seat. `peers`: the seats that are taken with it; `places`: where those are
    that have said so, for all of them."""

    name: str
    process: Process
    peers: Sequence[str]
    places: dict[str, Place]
    steps: deque[Step] = field(default_factory=deque)


class Processes:
    """
    Args:
        pulse_s: seconds between two signs of life.
    """

    def __init__(self, pulse_s: float) -> None:
        self.pulse_s = pulse_s
        self.workers: dict[str, Worker] = {}
        self.loads: Mapping[str, Steps] = {}  # of seats that others may take
        self._recipes: dict[str, Recipe] = {}
        self._pulses: dict[ObjectRef, tuple[str, Process]] = {}
        self._loading: dict[ObjectRef, Loading] = {}
        self._placed: dict[str, Loading] = {}  # they wait until all peers have said where they are
        self._last: dict[str, Process] = {}  # of those that are loading, or died while they did
        self._ask_again: dict[str, float] = {}

    def hire(self, name: str, recipe: Recipe) -> Worker:
        """Start the first actor of a seat; returns before it runs."""
        self._recipes[name] = recipe
        self.workers[name] = Worker(name, self._start(name))
        return self.workers[name]

    def _start(self, name: str) -> ActorHandle:
        recipe = self._recipes[name]
        remote = ray.remote(concurrency_groups={"watch": 1, "slices": 1, "weights": 1})(recipe.host)
        # No restarts by Ray: a blank actor would answer with base weights, and a repeated update would count twice.
        return remote.options(max_restarts=0, max_task_retries=0, **recipe.options).remote(name, recipe.around)

    def feel(self, name: str) -> None:
        process = self.workers[name].process
        self._pulses[process.actor.pulse.remote(self.pulse_s)] = (name, process)

    def wait(self, seconds: float) -> list[Sign]:
        now = time.monotonic()
        for name in [name for name, at in self._ask_again.items() if at <= now]:
            del self._ask_again[name]
            self.feel(name)
        asked = [*self._pulses, *self._loading]
        if not asked:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(asked, num_returns=1, timeout=seconds)
        return [sign for ref in done for sign in (self._pulse(ref) if ref in self._pulses else self._load(ref))]

    def _pulse(self, ref: ObjectRef) -> Iterable[Sign]:
        name, process = self._pulses.pop(ref)
        if process is not self.workers[name].process:
            return  # of one that was replaced
        try:
            ray.get(ref, timeout=FETCH_S)
        except ActorUnavailableError as error:
            self._ask_again[name] = time.monotonic() + ASK_AGAIN_S
            yield Sign(name, "out of reach", error)
        except RayError as error:
            yield Sign(name, "died", error)
        else:
            yield Sign(name, "alive")

    def restart(self, names: Sequence[str]) -> None:
        places: dict[str, Place] = {}
        for name in names:
            loading = Loading(name, Process(self._start(name)), tuple(names), places)
            self._last[name] = loading.process
            self._loading[loading.process.actor.place.remote()] = loading

    def _load(self, ref: ObjectRef) -> Iterable[Sign]:
        loading = self._loading.pop(ref)
        try:
            value = ray.get(ref, timeout=FETCH_S)
        except RayError as error:
            kill(loading.process.actor)  # it lives, if only the step failed, and keeps its CPUs and GPUs
            yield Sign(loading.name, "died", error)
            return
        if loading.name in loading.places:
            yield from self._next(loading)
            return
        loading.process = self._last[loading.name] = Process(loading.process.actor, value.node, value.pid)
        loading.places[loading.name], self._placed[loading.name] = value, loading
        if len(loading.places) == len(loading.peers):
            for name in loading.peers:
                steps, peer = self.loads[name], self._placed.pop(name)
                peer.steps.extend(steps(peer.places) if callable(steps) else steps)
                yield from self._next(peer)

    def _next(self, loading: Loading) -> Iterable[Sign]:
        if loading.steps:
            method, args = loading.steps.popleft()
            self._loading[getattr(loading.process.actor, method.__name__).remote(*args)] = loading
            return
        # From here on it gets work.
        self.workers[loading.name].process = loading.process
        del self._last[loading.name]
        yield Sign(loading.name, "loaded")

    def end(self, name: str) -> None:
        for ref, loading in list(self._loading.items()):
            if loading.name == name:
                del self._loading[ref]
                kill(loading.process.actor)
        if (placed := self._placed.pop(name, None)) is not None:
            kill(placed.process.actor)
        for ref, (felt, _) in list(self._pulses.items()):
            if felt == name:
                del self._pulses[ref]
        self._ask_again.pop(name, None)
        kill(self.workers[name].actor)

    def who(self, name: str) -> Worker:
        process = self._last.get(name, self.workers[name].process)
        return Worker(name, process.actor, process.node, process.pid)

    def end_all(self) -> None:
        for name in self.workers:
            self.end(name)


def kill(actor: ActorHandle) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor, no_restart=True)
