"""What travels between workers: each consumer is sent the rows that it computes with, and of them what it reads.

The unit is a slice: what one producer (a generator, the reference, the ranks of a critic) holds for one consumer (a
rank, the reward), as one Ray object. The driver decides which rows go where and never sees what they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.remote.batch import Part, RemoteBatch, RemoteColumn
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.health import State
from rlhf_ray.remote.packed import ROWS, TOKENS, Packed, empty_rows, unpack
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.division import Passes, RankBatch, RankPart
from rlhf_ray.roles.protocols import TEXTS
from rlhf_ray.roles.requests import Texts

if TYPE_CHECKING:
    from ray import ObjectRef

    from rlhf_ray.remote.crew import Crew


COLUMN = "column"  # a column that is a call's only result


@dataclass(frozen=True)
class Incoming:
    """What a slice means to the consumer: the names of its columns here, and which of the consumer's rows it holds."""

    names: Mapping[str, str]
    places: np.ndarray


@dataclass(frozen=True)
class Delivery:
    """Beside the slices: numbers a row, texts for those who read them, and a rank's passes."""

    rows: int
    incoming: tuple[Incoming, ...]
    values: Mapping[str, Tensor]  # [rows]
    texts: Mapping[int, Texts] = field(default_factory=dict)  # by prompt_id
    dummies: tuple[int, ...] = ()
    passes: tuple[Passes, ...] | None = None  # None: the consumer has all rows and divides them itself


def received(delivery: Delivery, slices: Sequence[Packed]) -> Batch:
    """The consumer's batch, its rows in the order that the driver gave them, whoever held them."""
    together: dict[tuple[str, ...], list[tuple[Packed, np.ndarray]]] = {}
    for incoming, piece in zip(delivery.incoming, slices, strict=True):
        renamed = Packed(
            {new: piece.ragged[old] for old, new in incoming.names.items() if old in piece.ragged},
            {new: piece.rows[old] for old, new in incoming.names.items() if old in piece.rows},
        )
        together.setdefault(tuple(incoming.names.values()), []).append((renamed, incoming.places))
    columns = []
    for pieces in together.values():
        order = np.argsort(np.concatenate([places for _, places in pieces]))
        columns.append(Packed.cat([piece for piece, _ in pieces]).select(order))
    packed, extra = Packed.joined(columns), len(delivery.dummies)
    if delivery.passes is None:
        return unpack(packed, delivery.values, _texts_of_rows(packed, delivery.texts))
    if extra:
        packed = Packed.cat([packed, empty_rows(packed, delivery.dummies)])
    values = {name: torch.cat([value_B, torch.ones(extra)]) for name, value_B in delivery.values.items()}
    whole = unpack(packed, values, _texts_of_rows(packed, delivery.texts))
    return RankBatch(**vars(whole), shares=tuple(passes.share() for passes in delivery.passes), own=delivery.rows)


def _texts_of_rows(packed: Packed, texts: Mapping[int, Texts]) -> dict[str, tuple[Any, ...]]:
    if not texts:
        return {}
    columns, chats = zip(*(texts[prompt] for prompt in packed.rows["prompt_id"].tolist()), strict=True)
    return {"columns": columns, "chats": chats}


def cut(names: Sequence[str], picks: Sequence[Sequence[np.ndarray]], held: Sequence[Packed]) -> list[Packed]:
    """The producer's side: for each consumer one slice, of the rows that it picks from each of the held objects."""
    return [
        Packed.cat([piece.select(rows, names) for piece, rows in zip(held, pick, strict=True)]) for pick in picks
    ]


class Sender:
    """Sends a batch to the consumers of one role.

    Args:
        name: of the role; what was cut for it once is not cut again.
    """

    def __init__(self, crew: Crew, name: str, consumers: Sequence[Worker], deadline: Deadline) -> None:
        self.crew, self.name, self.consumers, self.deadline = crew, name, list(consumers), deadline

    def send(
        self, batch: RemoteBatch, parts: Sequence[RankPart], reads: Sequence[str], divided: bool
    ) -> list[tuple[Delivery, list[ObjectRef]]]:
        """For each consumer its delivery and the references of its slices; all of them are ready.

        Args:
            parts: the rows of each consumer.
            reads: columns, beside tokens, masks and ids.
            divided: whether the consumers are ranks that are told their passes.
        """
        place = np.full((len(parts), len(batch)), -1)
        for own, part in zip(place, parts, strict=True):
            own[part.rows] = np.arange(len(part.rows))
        sent = self._sent(batch, place, reads)
        deliveries = []
        for consumer, part in enumerate(parts):
            incoming, refs = zip(*(pieces[consumer] for pieces in sent), strict=True)
            index = torch.from_numpy(part.rows)
            values = {
                name: value_B[index] for name in reads if isinstance(value_B := batch.values.get(name), Tensor)
            }
            texts = {}
            if TEXTS in reads:
                prompts = np.unique(batch.rows.prompt_id[part.rows]).tolist()
                texts = {prompt: batch.prompts[prompt] for prompt in prompts}
            passes = (part.dummies, part.passes) if divided else ((), None)
            deliveries.append((Delivery(len(part.rows), incoming, values, texts, *passes), list(refs)))
        return deliveries

    def _sent(self, batch: RemoteBatch, place: np.ndarray, reads: Sequence[str]) -> list[list[tuple[Incoming, Any]]]:
        """For each slice of a kind, what it is to each consumer and its reference."""
        known = batch.sent.setdefault(self.name, [])
        wanted = {*TOKENS, *ROWS, *(name for name in reads if name in ("logp_gen", "weight_version"))}
        there = {name for pieces in known for name in pieces[0][0].names.values()}
        found = [pieces for pieces in known if set(pieces[0][0].names.values()) & wanted]
        tokens = self._cut(batch.parts, {name: name for name in sorted(wanted - there)}, place)
        columns: dict[int, tuple[tuple[Part, ...], dict[str, str]]] = {}
        for name in reads:
            column = batch.values.get(name)
            if isinstance(column, RemoteColumn):
                columns.setdefault(id(column.parts), (column.parts, {}))[1][column.key] = name
        # A column may be read more than once. Its parts, which are the key, are kept as long as what was cut of them.
        read = batch.sent.setdefault(f"{self.name}: columns", {})
        keys = [(id(parts), tuple(names.items())) for parts, names in columns.values()]
        cuts = {
            key: self._cut(parts, names, place)
            for key, (parts, names) in zip(keys, columns.values(), strict=True)
            if key not in read
        }
        started = [*tokens, *itertools.chain.from_iterable(cuts.values())]
        self.crew.results([refs for _, refs in started if isinstance(refs, Call)])
        new = [_pieces(*cut) for cut in tokens]
        known += new
        for key, (parts, _) in zip(keys, columns.values(), strict=True):
            if key in cuts:
                read[key] = (parts, [_pieces(*cut) for cut in cuts[key]])
        return [*found, *new, *(pieces for key in keys for pieces in read[key][1])]

    def _cut(
        self, parts: Sequence[Part], names: Mapping[str, str], place: np.ndarray
    ) -> list[tuple[list[Incoming], list[Any] | Call]]:
        """By producer: what its slice is to each consumer, and their references or the call that will keep them."""
        if not names:
            return []
        if self._own(parts, place):  # they computed it themselves: it does not move
            mine = [Incoming(names, place[i][part.rows]) for i, part in enumerate(parts)]
            return [(mine, [part.ref for part in parts])]
        if len(place) == 1 and tuple(names) == (COLUMN,):  # one consumer takes what each of them holds whole
            return [([Incoming(names, place[0][part.rows])], [part.ref]) for part in parts]
        by_worker: dict[str, list[Part]] = {}
        for part in parts:
            by_worker.setdefault(part.worker.name, []).append(part)
        cuts: list[tuple[list[Incoming], list[Any] | Call]] = []
        for held in by_worker.values():
            places = [[own[part.rows] for part in held] for own in place]
            picks = [[part.places[at >= 0] for part, at in zip(held, own, strict=True)] for own in places]
            incoming = [Incoming(names, np.concatenate([at[at >= 0] for at in own])) for own in places]
            cuts.append((incoming, self._begin(held[0].worker, list(names), picks, [part.ref for part in held])))
        return cuts

    def _begin(self, holder: Worker, names: Sequence[str], picks: Sequence[Any], held: Sequence[ObjectRef]) -> Call:
        """The objects outlive the process that made them: where that is lost, another of its role cuts them."""
        others = [worker for worker in self.crew.named(holder.name.split()[0]) if worker is not holder]
        able = [worker for worker in (holder, *others) if self.crew.state(worker) is State.HEALTHY]
        call = (able or [holder])[0].cut(names, picks, held, deadline=self.deadline)
        call.others = others
        return call

    def _own(self, parts: Sequence[Part], place: np.ndarray) -> bool:
        """Whether each consumer holds exactly its own rows of these columns."""
        return [part.worker.name for part in parts] == [consumer.name for consumer in self.consumers] and all(
            len(part.rows) == (own >= 0).sum() and (own[part.rows] >= 0).all()
            for part, own in zip(parts, place, strict=True)
        )


def _pieces(incoming: Sequence[Incoming], refs: Sequence[Any] | Call) -> list[tuple[Incoming, Any]]:
    return list(zip(incoming, refs.kept if isinstance(refs, Call) else refs, strict=True))
