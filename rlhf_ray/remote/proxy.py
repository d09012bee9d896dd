"""A role on Ray behind the methods that its protocol declares (`roles/protocols.py`): declared once, called as locally.

    learner = proxy(Learner, group)
    learner.learn(batch)  # every rank's Learner.learn, each with its own rows

Arguments and results are what they are locally, but for batches and columns of tokens: these stay with the workers, and
here are a `RemoteBatch` and `RemoteColumn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from rlhf_ray.remote.batch import Part, RemoteBatch, RemoteColumn
from rlhf_ray.remote.calls import Deadline
from rlhf_ray.remote.crew import Group
from rlhf_ray.remote.hosts import BATCH, COLUMN, Answer
from rlhf_ray.remote.slices import Sender
from rlhf_ray.roles.division import Division, RankPart
from rlhf_ray.roles.protocols import Estimate, Ranks

if TYPE_CHECKING:
    from ray import ObjectRef

Role = TypeVar("Role")


def proxy(protocol: type[Role], group: Group, *, divides: bool = False, deadlines: Mapping[str, Deadline] = {}) -> Role:
    """An object with the public methods and properties of `protocol`, each one a call of all the group's workers.

    Args:
        divides: whether the workers are ranks that share a batch's rows; else each is sent all of them.
        deadlines: by method, where it is not the group's own.
    """
    forward = _Forward(group, divides, deadlines)
    members = {
        name: _forwarded(member, forward)
        for base in reversed(protocol.__mro__)
        for name, member in vars(base).items()
        if not name.startswith("_") and isinstance(member, FunctionType | property)
    }
    return cast(Role, type(f"Remote{protocol.__name__}", (), members)())


def _forwarded(member: FunctionType | property, forward: _Forward) -> Any:
    if isinstance(member, property):
        return property(lambda self: forward(member.fget, ()))
    parameters = signature(member)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(self, *args, **kwargs)
        return forward(member, bound.args[1:])

    call.__name__, call.__doc__ = member.__name__, member.__doc__
    return call


class _Forward:
    """One call after the other: all ranks must hear of collectives in the same order."""

    def __init__(self, group: Group, divides: bool, deadlines: Mapping[str, Deadline]) -> None:
        self.group = group
        self.divides = divides
        self.deadlines = deadlines
        role = group.ranks[0].name.split()[0]
        self.sender = Sender(group.crew, role, group.ranks, group.deadline)
        self._turn = Lock()
        self._division: Division | None = None

    def __call__(self, method: Callable[..., Any], args: Sequence[Any]) -> Any:
        deadline = self.deadlines.get(method.__name__, self.group.deadline)
        batch = next((argument for argument in args if isinstance(argument, RemoteBatch)), None)
        plain = tuple(_portable(argument) for argument in args)
        with self._turn:
            if batch is None:
                return self.group.call(method, *plain, deadline=deadline)
            return self._with_batch(method, plain, batch, deadline)

    def _with_batch(
        self, method: Callable[..., Any], args: Sequence[Any], batch: RemoteBatch, deadline: Deadline
    ) -> Any:
        parts = self._parts(batch)
        reads = getattr(method, "reads", ())
        sent = self.sender.send(batch, parts, reads, self.divides)
        started = [
            rank.compute(method, args, delivery, slices, deadline=deadline)
            for rank, (delivery, slices) in zip(self.group.ranks, sent, strict=True)
        ]
        answers = self.group.finish(started)
        return self._assembled(answers, [call.kept[0] for call in started], parts)

    def _parts(self, batch: RemoteBatch) -> list[RankPart]:
        """Which rows each rank computes; the same for every call with this batch."""
        if not self.divides:
            return [RankPart(np.arange(len(batch)))]
        key = f"{self.sender.name}: parts"
        if key not in batch.sent:
            if self._division is None:
                self._division = self.group.call(Ranks.division.fget)
            batch.sent[key] = self._division.parts(batch.rows)
        return batch.sent[key]

    def _assembled(self, answers: Sequence[Answer], refs: Sequence[ObjectRef], parts: Sequence[RankPart]) -> Any:
        first = answers[0]
        if first.by_row:
            whole_B = torch.zeros(sum(len(part.rows) for part in parts))
            for part, answer in zip(parts, answers, strict=True):
                whole_B[part.rows] = answer.value
            return whole_B
        if not first.columns:
            return first.value
        held = tuple(
            Part(rank, ref, np.arange(len(part.rows)), part.rows)
            for rank, ref, part in zip(self.group.ranks, refs, parts, strict=True)
        )
        columns = {name: RemoteColumn(held, name) for name in first.columns}
        return columns[COLUMN] if COLUMN in columns else Estimate(cast(Any, columns), first.value)


def _portable(argument: Any) -> Any:
    if isinstance(argument, Path):
        return argument.resolve()  # the workers may stand in another folder
    return BATCH if isinstance(argument, RemoteBatch) else argument
