"""A batch as the driver sees it on Ray: references and plain numbers, never a [B, T] tensor.

`RemoteBatch` mirrors `Batch` as far as the loop uses it (`replace`, `rows`), so that one loop serves both.
Whoever computes with it receives the batch and its columns as arguments and puts them together with `joined`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf_ray.batch import Batch, Rows

if TYPE_CHECKING:
    from ray import ObjectRef

# Optional fields of a Batch: what may be added to one that was generated.
COLUMNS = tuple(f.name for f in dataclasses.fields(Batch) if f.default is not dataclasses.MISSING)


@dataclass(frozen=True)
class RemoteColumn:
    """A tensor that lies in a worker's memory; `key` picks it out of a dict of several."""

    ref: ObjectRef
    key: str | None = None


@dataclass(frozen=True)
class RemoteBatch:
    """One step's rollouts, wherever they are."""

    ref: ObjectRef  # of a Batch
    rows: Rows
    columns: Mapping[str, RemoteColumn | Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def replace(self, **columns: RemoteColumn | Tensor) -> RemoteBatch:
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
        return dataclasses.replace(self, columns={**self.columns, **columns})

    def arguments(self) -> tuple[Any, ...]:
        """What a remote call takes for this batch; `joined` reads it. References stand at the top level, where
        Ray resolves them on the worker."""
        names = tuple((name, getattr(column, "key", None)) for name, column in self.columns.items())
        return self.ref, names, *(getattr(column, "ref", column) for column in self.columns.values())


def joined(batch: Batch, names: Sequence[tuple[str, str | None]], *columns: Any) -> Batch:
    """The whole batch, from the resolved `RemoteBatch.arguments()`."""
    values = {name: column if key is None else column[key] for (name, key), column in zip(names, columns, strict=True)}
    return batch.replace(**values)
