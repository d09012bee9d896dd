"""A role on Ray behind the methods that its protocol declares (`roles/protocols.py`): declared once, called as locally.

    learner = proxy(Learner, group)
    learner.learn(batch)  # every rank's Learner.learn, each with its own rows

    reward = proxy(Reward, replicas)
    reward.score(batch)  # of the replica that is free

Arguments and results are what they are locally, but for batches and columns of tokens: these stay with the workers, and
here are a `RemoteBatch` and `RemoteColumn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from rlhf_ray.remote.batch import Part, RemoteBatch, RemoteColumn
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.crew import Group
from rlhf_ray.remote.hosts import BATCH, Answer
from rlhf_ray.remote.replicas import Replica, Replicas
from rlhf_ray.remote.slices import COLUMN, Sender
from rlhf_ray.roles.division import Division, RankPart
from rlhf_ray.roles.protocols import Divided, Estimate

if TYPE_CHECKING:
    from ray import ObjectRef

Role = TypeVar("Role")
# A step is cut into so many pieces for each replica. More would cost calls; fewer, work that is lost with a replica,
# and waiting for the last one. How many there are changes no number (`Division.pieces`).
PIECES = 4


def proxy(
    protocol: type[Role], workers: Group | Replicas, *, divides: bool = False, deadlines: Mapping[str, Deadline] = {}
) -> Role:
    """An object with the public methods and properties of `protocol`. Each is a call of all workers of a group, or of
    one of several replicas.

    Args:
        divides: whether they share a batch's rows; else each that is called is sent all of them.
        deadlines: by method, where it is not the workers' own.
    """
    forward = (_Forward if isinstance(workers, Group) else _ForwardToOne)(workers, divides, deadlines)
    members = {
        name: _forwarded(member, forward)
        for base in reversed(protocol.__mro__)
        for name, member in vars(base).items()
        if not name.startswith("_") and isinstance(member, FunctionType | property)
    }
    return cast(Role, type(f"Remote{protocol.__name__}", (), members)())


def _forwarded(member: FunctionType | property, forward: _Forward | _ForwardToOne) -> Any:
    if isinstance(member, property):
        return property(lambda self: forward(member.fget, (), {}))
    parameters = signature(member)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(self, *args, **kwargs)
        return forward(member, bound.args[1:], bound.kwargs)  # those that can only be given by name

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

    def __call__(self, method: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        deadline = self.deadlines.get(method.__name__, self.group.deadline)
        batch, args, keywords = _portable(args, keywords)
        with self._turn:
            self.group.crew.check()  # what has taken a seat of a lost rank holds nothing yet
            if batch is None:
                return self.group.call(method, *args, deadline=deadline, keywords=keywords)
            parts = self._parts(batch)
            sent = self.sender.send(batch, parts, getattr(method, "reads", ()), self.divides)
            started = [
                rank.compute(method, args, keywords, delivery, slices, deadline=deadline).about(_prompts(batch, part))
                for rank, part, (delivery, slices) in zip(self.group.ranks, parts, sent, strict=True)
            ]
            answers = self.group.finish(started)
        return _assembled(self.group.ranks, answers, [call.kept[0] for call in started], parts)

    def _parts(self, batch: RemoteBatch) -> list[RankPart]:
        """Which rows each rank computes; the same for every call with this batch."""
        if not self.divides:
            return [RankPart(np.arange(len(batch)))]
        key = f"{self.sender.name}: parts"
        if key not in batch.sent:
            if self._division is None:
                self._division = self.group.call(Divided.division.fget)
            batch.sent[key] = self._division.parts(batch.rows)
        return batch.sent[key]


class _ForwardToOne:
    """Each call goes to one replica; or, divided, in pieces to all of them."""

    def __init__(self, replicas: Replicas, divides: bool, deadlines: Mapping[str, Deadline]) -> None:
        self.replicas = replicas
        self.divides = divides
        self.deadlines = deadlines
        role = replicas.replicas[0][0].name.split()[0]
        self.sender = Sender(replicas.crew, role, (), replicas.deadline)
        self._division: Division | None = None

    def __call__(self, method: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        deadline = self.deadlines.get(method.__name__, self.replicas.deadline)
        batch, args, keywords = _portable(args, keywords)
        if batch is None:
            [done] = self.replicas.compute([
                lambda replica: [seat.ask(method, *args, deadline=deadline, keywords=keywords) for seat in replica]
            ])  # fmt: skip
            return done.values[0]
        pieces = self._pieces(batch)
        parts = [part for piece in pieces for part in piece]
        sent = iter(self.sender.send(batch, parts, getattr(method, "reads", ()), self.divides))

        def start(piece: Sequence[RankPart], deliveries: Sequence[Any], replica: Replica) -> list[Call]:
            return [
                seat.compute(method, args, keywords, delivery, slices, deadline=deadline).about(_prompts(batch, part))
                for seat, part, (delivery, slices) in zip(replica, piece, deliveries, strict=True)
            ]

        done = self.replicas.compute([partial(start, piece, [next(sent) for _ in piece]) for piece in pieces])
        workers = [seat for piece in done for seat in piece.replica]
        answers = [value for piece in done for value in piece.values]
        return _assembled(workers, answers, [call.kept[0] for piece in done for call in piece.calls], parts)

    def _pieces(self, batch: RemoteBatch) -> list[list[RankPart]]:
        """What each of a replica's workers computes of each piece."""
        if not self.divides:
            return [[RankPart(np.arange(len(batch)))] * len(self.replicas.replicas[0])]
        if self._division is None:
            self._division = self(Divided.division.fget, (), {})
        return self._division.pieces(batch.rows, PIECES * len(self.replicas.replicas))


def _prompts(batch: RemoteBatch, part: RankPart) -> Callable[[], Sequence[int]]:
    return lambda: batch.rows.prompt_id[part.rows].tolist()


def _assembled(
    workers: Sequence[Worker], answers: Sequence[Answer], refs: Sequence[ObjectRef], parts: Sequence[RankPart]
) -> Any:
    """What the call returns, of which each worker has computed a part."""
    first = answers[0]
    if first.by_row:
        whole_B = torch.zeros(sum(len(part.rows) for part in parts))
        for part, answer in zip(parts, answers, strict=True):
            whole_B[part.rows] = answer.value
        return whole_B
    if not first.columns:
        return first.value
    held = tuple(
        Part(worker, ref, np.arange(len(part.rows)), part.rows)
        for worker, ref, part in zip(workers, refs, parts, strict=True)
    )
    columns = {name: RemoteColumn(held, name) for name in first.columns}
    return columns[COLUMN] if COLUMN in columns else Estimate(cast(Any, columns), first.value)


def _portable(
    args: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[RemoteBatch | None, tuple[Any, ...], dict[str, Any]]:
    """The batch among the arguments, if there is one, and what travels of them."""
    batch = next((argument for argument in (*args, *keywords.values()) if isinstance(argument, RemoteBatch)), None)

    def plain(argument: Any) -> Any:
        if isinstance(argument, Path):
            return argument.resolve()  # the workers may stand in another folder
        return BATCH if isinstance(argument, RemoteBatch) else argument

    return batch, tuple(map(plain, args)), {name: plain(argument) for name, argument in keywords.items()}
