"""What every role that trains a network does with it on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.trainable import SkippedSteps
from rlhf_ray.models.written import Written


@runtime_checkable
class WritesBehind(Protocol):
    """An engine that writes a checkpoint while it computes on; one of a user's own need not."""

    def begin_save(self, folder: Path) -> None: ...
    def is_saved(self) -> bool: ...
    def saved(self) -> Written | None: ...


class Checkpointed:
    """Base of the roles that train. All of it is collective."""

    engine: TrainEngine
    _skipped: SkippedSteps
    _saved_at_once: Written | None = None

    def _require_rest(self, call: str) -> None:
        """Raises StepError inside a step."""

    def save(self, folder: Path) -> Written | None:
        """All that a bit-equal continuation needs; what all ranks wrote. Raises StepError inside a step."""
        self._require_rest("save")
        self._skipped.save(folder, self.engine.rank)
        return self.engine.save(folder)

    def begin_save(self, folder: Path) -> None:
        """As `save`, but back as soon as the state is copied: `saved` has the rest, with whatever goes wrong."""
        self._require_rest("begin_save")
        self._skipped.save(folder, self.engine.rank)
        if isinstance(self.engine, WritesBehind):
            self.engine.begin_save(folder)
        else:
            self._saved_at_once = self.engine.save(folder)

    def is_saved(self) -> bool:
        """Whether all ranks have ended what `begin_save` began."""
        return self.engine.is_saved() if isinstance(self.engine, WritesBehind) else True

    def saved(self) -> Written | None:
        """Waits for it. Raises what went wrong, on every rank."""
        return self.engine.saved() if isinstance(self.engine, WritesBehind) else self._saved_at_once

    def load(self, folder: Path) -> None:
        """Undo `save`. Raises CheckpointError, and StepError inside a step."""
        self._require_rest("load")
        self.engine.load(folder)
        self._skipped.load(folder)
