"""A batch's way to the disk and back (checkpoints, bad steps): only then do its tokens pass through the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
from torch import Tensor

from rlhf_ray.remote.batch import COLUMNS, Part, RemoteBatch, RemoteColumn
from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.crew import Crew
from rlhf_ray.remote.packed import Packed, pack, unpack
from rlhf_ray.roles.batch import Batch


@dataclass(frozen=True)
class RemoteStore:
    """A `roles.protocols.BatchStore` for batches that wait for the learner.

    Args:
        holder: who cuts what comes back; any worker that lives as long as the run.
    """

    crew: Crew
    holder: Worker
    deadline: Deadline

    def fetch(self, batch: RemoteBatch) -> Batch:
        """Its tokens, what the driver knows of its rows and what workers have computed of its tokens; without texts.
        Raises WorkerError if a part is lost."""
        values = {name: value for name, value in batch.values.items() if isinstance(value, Tensor)}
        columns = [self._whole(batch.parts)]
        for name, column in batch.values.items():
            if isinstance(column, RemoteColumn):
                columns.append(Packed({name: self._whole(column.parts, [column.key]).ragged[column.key]}))
        return unpack(Packed.joined(columns), values, {})

    def _whole(self, parts: Sequence[Part], names: Sequence[str] | None = None) -> Packed:
        """What these workers hold of all rows, in their order."""
        held = self.crew.results([
            Call(part.worker, "fetch", lambda actor, ref=part.ref: ref, self.deadline) for part in parts
        ])  # fmt: skip
        pieces = [packed.select(part.places, names) for packed, part in zip(held, parts, strict=True)]
        return Packed.cat(pieces).select(np.argsort(np.concatenate([part.rows for part in parts])))

    def place(self, batch: Batch) -> RemoteBatch:
        """What `fetch` gave, where workers can have it; `columns` and `chats` belong to its prompts."""
        ids, every = batch.prompt_id.tolist(), np.arange(len(batch))
        prompts = dict(zip(ids, zip(batch.columns, batch.chats, strict=True), strict=True))
        values = {name: value for name in COLUMNS if (value := getattr(batch, name)) is not None and value.dim() == 1}
        return RemoteBatch((Part(self.holder, ray.put(pack(batch)), every, every),), batch.rows, prompts, values)
