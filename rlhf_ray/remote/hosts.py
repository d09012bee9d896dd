"""What runs inside the actors: a host holds the very object that a local run would use, and passes calls on to it.

The driver says how the role is made (`roles/makers.py`). There is a class for each role, by which a process and its
errors are named; what they differ in is how they end. Batches arrive as slices (`remote/slices.py`). Columns of tokens
are returned as the first of two values, so that the driver can wait for the second without ever touching the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from torch import Tensor

from rlhf_ray.errors import ConfigError
from rlhf_ray.remote.calls import Worker
from rlhf_ray.remote.failures import reported, reporting
from rlhf_ray.remote.host import Host
from rlhf_ray.remote.packed import Packed, Ragged, pack
from rlhf_ray.remote.slices import COLUMN, Delivery, cut, received
from rlhf_ray.roles.batch import Batch, Rows, batch_of
from rlhf_ray.roles.division import RankBatch
from rlhf_ray.roles.protocols import Engine, Estimate, Generator, Sampling
from rlhf_ray.roles.requests import Requests
from rlhf_ray.roles.serving import WholeGroups

BATCH = "<the batch>"  # stands in for it among the arguments of a call


@dataclass(frozen=True)
class Answer:
    """The small part of a call's result."""

    value: Any = None
    columns: tuple[str, ...] = ()  # that were kept
    by_row: bool = False  # `value` is a number for each of the consumer's own rows


class RoleHost(Host):
    role: Any

    @reported
    def build(self, make: Callable[..., Any], *given: Any) -> None:
        """`given`: the maker's last arguments, such as a rank; Ray resolves a reference among them."""
        self.release_port()  # rank 0 listens there from now on
        self.role = make(*given)

    @reported
    def ask(self, name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """A method of the role with these arguments, or what a property of it is."""
        with reporting(f"{self.name}: {name}"):
            value = getattr(self.role, name)
            return value(*args, **keywords) if callable(value) else value

    @reported
    @ray.method(num_returns=2)
    def compute(
        self, name: str, args: Sequence[Any], keywords: Mapping[str, Any], delivery: Delivery, *slices: Packed
    ) -> tuple[Packed | None, Answer]:
        """A method of the role with a batch in the place of `BATCH`."""
        with reporting(f"{self.name}: {name}"):
            batch = received(delivery, slices)

            def given(argument: Any) -> Any:
                return batch if isinstance(argument, str) and argument == BATCH else argument

            named = {name: given(argument) for name, argument in keywords.items()}
            return kept(getattr(self.role, name)(*map(given, args), **named), batch)

    @reported
    @ray.method(concurrency_group="slices")
    def cut(self, names: Sequence[str], picks: Sequence[Sequence[np.ndarray]], *held: Packed) -> tuple[Any, ...]:
        """A slice for each consumer, also while the role computes; the last value is for waiting."""
        return (*cut(names, picks, held), None)


def kept(result: Any, batch: Batch) -> tuple[Packed | None, Answer]:
    """(what stays here, what the driver is told) of a call's result."""
    own = batch.own if isinstance(batch, RankBatch) else len(batch)
    mask_BT = batch.response_mask[:own]

    def columns(tensors: dict[str, Tensor]) -> Packed:
        lengths = mask_BT.sum(1).numpy()
        return Packed({name: Ragged(x_BT[:own][mask_BT].numpy(), lengths) for name, x_BT in tensors.items()})

    if isinstance(result, Estimate):
        return columns(result.columns), Answer(result.stats, tuple(result.columns))
    if isinstance(result, Tensor) and result.dim() == 2:
        return columns({COLUMN: result}), Answer(columns=(COLUMN,))
    if isinstance(result, Tensor):
        return None, Answer(result[:own], by_row=True)
    return None, Answer(result)


@dataclass(frozen=True)
class Written:
    """What a generator says of answers that have ended, whole groups of them."""

    rows: Rows
    sample_ids: np.ndarray


class GeneratorHost(RoleHost):
    """A service: it drives its engine itself. Weights change between two calls of `write`, whatever is open then."""

    role: Generator
    groups: WholeGroups

    @reported
    def build(self, make: Callable[..., Any], *given: Any) -> None:
        super().build(make, *given)
        self.serve(self.role)

    def serve(self, role: Generator) -> None:
        if not isinstance(role, Engine):
            raise ConfigError(
                f"the generator {type(role).__name__} has no submit, collect or cancel, by which work reaches it on "
                "Ray (Engine in rlhf_ray/roles/protocols.py); add them, or set executor=local"
            )
        self.role, self.groups = role, WholeGroups(role)

    @reported
    @ray.method(num_returns=2)
    def write(
        self, requests: Requests, sampling: Sampling, least: int
    ) -> tuple[Packed | None, Written | None]:
        """Take these requests on, and write until so many groups are whole or nothing is open: all that are whole then,
        as one object. None: there was nothing to do."""
        self.groups.submit(requests, sampling)
        samples = self.groups.collect(least)
        if not samples:
            return None, None
        batch = batch_of(samples, [{}] * len(samples), [None] * len(samples))
        return pack(batch), Written(batch.rows, batch.sample_id.numpy())

    @reported
    def drop(self) -> None:
        """Forget what is open."""
        self.groups.cancel()

    @reported
    def shut_down(self) -> None:
        self.role.close()


class RankHost(RoleHost):
    """A rank of a training group. Collective: every rank gets every call, with its own part of the batch."""

    @reported
    def shut_down(self) -> None:
        self.role.engine.close()


class LearnerHost(RankHost):
    @reported
    @ray.method(concurrency_group="weights")
    def send_again(self, generator: Worker) -> bool:
        """Send the weights that were sent last to a process that takes the place of a lost one, also while the role
        computes; from then on it is sent all that follow. Returns whether it has them: it may be lost, too, and before
        the first sync there are none."""
        sender, everybody = self.role.sender, self.role.generators
        if everybody is None:  # a rank that has taken a seat itself
            return False
        one = everybody.only(generator)
        with sender.turn:  # no update of all is under way, and none begins before this one belongs to all
            sent = sender.send_again(one) and bool(one.generators)
            if sent:
                everybody.join(generator)
        return sent

    @reported
    def shut_down(self) -> None:
        self.role.sender.close()
        self.role.engine.close()


class CriticHost(RankHost):
    """A rank of the critic."""


class ReferenceHost(RoleHost):
    """The frozen policy."""


class RewardHost(RoleHost):
    """The reward functions, and the networks that judge."""
