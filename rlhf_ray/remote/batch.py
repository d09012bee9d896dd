"""A batch as the driver sees it on Ray: references and plain numbers, never anything that grows with its tokens.

`RemoteBatch` mirrors `Batch` as far as the loop and the estimator of advantages use it, so that both serve locally and
on Ray. What its rows hold lies with the workers that made it, unpadded (packed.py), each row with one of
them; slices.py sends to each consumer what it reads of its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rlhf_ray.remote.calls import Worker
from rlhf_ray.roles.batch import Batch, Rows
from rlhf_ray.roles.requests import Texts

if TYPE_CHECKING:
    from ray import ObjectRef

# Optional fields of a Batch: what may be added to one that was generated.
COLUMNS = tuple(f.name for f in dataclasses.fields(Batch) if f.default is not dataclasses.MISSING)


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a batch, in one object that a worker holds."""

    worker: Worker
    ref: ObjectRef  # of a Packed
    places: np.ndarray  # [n] which rows of it
    rows: np.ndarray  # [n] which rows of the batch they are


@dataclass(frozen=True, eq=False)
class RemoteColumn:
    """A number a token, which lies with the workers that computed it; there it is called `key`."""

    parts: tuple[Part, ...]
    key: str


@dataclass(frozen=True, eq=False)
class RemoteBatch:
    """One step's rollouts, wherever they are."""

    parts: tuple[Part, ...]
    rows: Rows
    prompts: Mapping[int, Texts]  # by prompt_id
    values: Mapping[str, RemoteColumn | Tensor] = field(default_factory=dict)
    # What has been cut for whom, so that nobody is sent the same tokens twice. Copies of the batch share it.
    sent: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def replace(self, **columns: RemoteColumn | Tensor | None) -> RemoteBatch:
        """A copy with some columns replaced. A tensor of one number a row may come from the driver itself.

        Raises:
            TypeError: an unknown column, or a per-token tensor, which must not pass through the driver.
        """
        for name, column in columns.items():
            if name not in COLUMNS:
                raise TypeError(f"RemoteBatch.replace: '{name}' is not a column; columns are {', '.join(COLUMNS)}")
            if isinstance(column, Tensor) and column.dim() != 1:
                raise TypeError(
                    f"RemoteBatch.replace: '{name}' is a tensor of shape {tuple(column.shape)} on the driver; "
                    "compute it on a worker and pass its RemoteColumn"
                )
        merged = {**self.values, **columns}
        return dataclasses.replace(self, values={name: value for name, value in merged.items() if value is not None})

    @property
    def columns(self) -> tuple[Mapping[str, Any], ...]:
        """[B] dataset columns of each row's prompt, as `Batch.columns`."""
        return tuple(self.prompts[prompt][0] for prompt in self.rows.prompt_id.tolist())

    def writer_of(self, row: int) -> str:
        return next(str(part.worker) for part in self.parts if row in part.rows)

    @property
    def score(self) -> Any:
        return self.values.get("score")

    @property
    def baseline(self) -> Any:
        return self.values.get("baseline")

    @property
    def logp_ref(self) -> Any:
        return self.values.get("logp_ref")


def gather_remote(chosen: Sequence[tuple[RemoteBatch, Sequence[int]]]) -> RemoteBatch:
    """`batch.gather`: one batch from the given rows of several. Nothing is moved."""
    parts: list[Part] = []
    prompts: dict[int, Any] = {}
    start = 0
    for batch, rows in chosen:
        place = np.full(len(batch), -1)
        place[np.asarray(rows, np.int64)] = start + np.arange(len(rows))
        for part in batch.parts:
            kept = place[part.rows] >= 0
            parts.append(dataclasses.replace(part, places=part.places[kept], rows=place[part.rows[kept]]))
        prompts |= batch.prompts
        start += len(rows)
    return RemoteBatch(tuple(parts), Rows.cat([batch.rows.select(rows) for batch, rows in chosen]), prompts)
