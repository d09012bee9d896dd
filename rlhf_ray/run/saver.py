"""The checkpoints of a run as its loop asks for them: at once, or written behind the steps that follow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.models.written import Written
from rlhf_ray.roles.protocols import Saves
from rlhf_ray.run.checkpoint import Checkpoints, Unsealed


@dataclass(frozen=True)
class _Behind:
    """A checkpoint that others still write, and what is done when they have."""

    unsealed: Unsealed
    roles: Mapping[str, Saves]
    protect: Collection[int]
    metrics: Mapping[str, float]


class Saver:
    """One checkpoint at a time: a second waits for the first."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._behind: _Behind | None = None

    def save(
        self, step: int, roles: Mapping[str, Saves], fill: Callable[[Path], None], state: Mapping[str, Any],
        protect: Collection[int], metrics: Mapping[str, float], *, behind: bool,
    ) -> None:  # fmt: skip
        """As `Checkpoints.save`; each role writes into a folder of its name, `fill` into the checkpoint's own.

        behind: back when the roles have copied what they hold. It is no checkpoint before `look` or `finish` has
        sealed it: these raise what went wrong meanwhile.
        """
        self.finish()
        if not behind:
            def write(folder: Path) -> dict[str, Written | None]:
                fill(folder)
                return {name: role.save(folder / name) for name, role in roles.items()}

            self.checkpoints.save(step, write, state, protect, metrics)
            return

        def begin(folder: Path) -> None:
            fill(folder)
            for name, role in roles.items():
                role.begin_save(folder / name)

        self._behind = _Behind(self.checkpoints.begin(step, begin, state), roles, protect, metrics)

    def look(self) -> None:
        """Seal what has been written by now. Waits for nothing. Raises as `Checkpoints.save` does."""
        if self._behind is not None and all(role.is_saved() for role in self._behind.roles.values()):
            self.finish()

    def finish(self) -> None:
        """Wait for what is still being written, and seal it. Raises as `Checkpoints.save` does."""
        behind, self._behind = self._behind, None
        if behind is not None:
            def told() -> dict[str, Written | None]:
                return {name: role.saved() for name, role in behind.roles.items()}

            self.checkpoints.seal(behind.unsealed, told, behind.protect, behind.metrics)

    def drop(self) -> None:
        """Of those who write, some are gone: what they have begun never becomes a checkpoint."""
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.unsealed.remove()
