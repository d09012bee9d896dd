"""What a run leaves of its policy: a model folder, and with LoRA the adapter's folder beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rlhf_ray.run.storage import written_whole


class Exporting(Protocol):
    """A learner or a supervised trainer."""

    def export_model(self, folder: Path) -> None: ...
    def export_adapter(self, folder: Path) -> None: ...


def export(role: Exporting, model: Path, adapter: Path | None, what: str = "the model") -> None:
    """Write the folder `model`, LoRA merged, and the folder `adapter` where one is named. Raises StorageError."""
    with written_whole(what, model) as unfinished:
        role.export_model(unfinished)
    if adapter is not None:
        with written_whole(f"the LoRA adapter of {what}", adapter) as unfinished:
            role.export_adapter(unfinished)
