"""Steps whose gradients or weights were not finite, kept for inspection: RUN/bad_steps/step_N/, a few in a run.

    batch.safetensors  everything that the learner and the critic were given of each row
    step.json          the step, the KL coefficient, its metrics, why it was kept, and some of its texts

`rlhf-ray replay` computes such a step again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.errors import DataError, DivergenceError
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import BatchStore, Scores
from rlhf_ray.run.loggers import rollout_rows
from rlhf_ray.run.storage import read_object, to_json, write_atomically, written_whole
from rlhf_ray.run.training_run import SKIPPED, TrainingRun

FOLDER = "bad_steps"
MOST = 3
_BATCH, _STEP = "batch.safetensors", "step.json"


@dataclass(frozen=True)
class BadStep:
    """What was kept of one.

    Attributes:
        step: from 1, as in metrics.jsonl: its weights were those after `step - 1`.
        why: `skipped` or `diverged`, and with what message.
        batch: without what its prompts say beside their tokens.
    """

    step: int
    kl_coef: float
    why: str
    batch: Batch

    @classmethod
    def read(cls, folder: Path) -> BadStep:
        """Raises DataError where the folder does not hold one."""
        told = read_object(folder / _STEP)
        try:
            columns = load_file(folder / _BATCH)
            nothing = (None,) * len(columns["tokens"])
            batch = Batch(**columns, columns=nothing, chats=nothing)
            return cls(int(told["step"]), float(told["kl_coef"]), str(told["why"]), batch)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder}: holds no step that a run has kept, or a damaged one ({type(error).__name__}: {error}); "
                f"name a folder like RUN/{FOLDER}/step_12"
            ) from error


class BadSteps:
    """Keeps the first step of a run that was skipped, and each that has ended it as diverged."""

    def __init__(self, run: TrainingRun, store: BatchStore) -> None:
        self.run = run
        self.store = store
        self.folder = run.directory.path / FOLDER

    def watch(
        self, step: int, batch: Any, scores: Scores, kl_coef: float, metrics: Mapping[str, float]
    ) -> _Watch:
        """For `with`, around what may find that the step (from 1) is bad; it may be entered several times.

        `metrics` is looked at on the way out.
        """
        return _Watch(self, step, batch, scores, kl_coef, metrics)

    def keep(self, bad: _Watch, why: str) -> None:
        """Write it down. What goes wrong here is told, and hides nothing: the run's own end is what counts."""
        folder = self.folder / f"step_{bad.step}"
        try:
            batch = self.store.fetch(bad.batch)
            self.folder.mkdir(exist_ok=True)
            with written_whole("a bad step", folder) as unfinished:
                save_file(_columns(batch), unfinished / _BATCH)
                write_atomically(unfinished / _STEP, to_json(_told(bad, batch, why), indent=1) + "\n")
            for old in self._kept()[1:-2]:  # the first stays, for it shows how it began
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            self.run.directory.event("bad_step_lost", step=bad.step, reason=f"{type(error).__name__}: {error}")
            self.run.note(f"the batch of step {bad.step} could not be kept: {error}")
            return
        self.run.directory.event("bad_step_kept", step=bad.step, reason=why)
        self.run.note(f"the batch of step {bad.step} is kept; see what is not finite: rlhf-ray replay {folder}")

    def is_first(self) -> bool:
        return not self._kept()

    def _kept(self) -> list[Path]:
        folders = [path for path in self.folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


@dataclass(frozen=True)
class _Watch:
    to: BadSteps
    step: int
    batch: Any  # as the loop has it
    scores: Scores
    kl_coef: float
    metrics: Mapping[str, float]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DivergenceError):
            self.to.keep(self, f"diverged: {error}")
        elif error is None and any(self.metrics.get(name, 0) for name in SKIPPED) and self.to.is_first():
            self.to.keep(self, "skipped: an optimiser step had no finite gradient")


def _columns(batch: Batch) -> dict[str, Tensor]:
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    # Safetensors takes no two tensors that share their memory.
    return {name: value.contiguous().clone() for name, value in columns.items() if isinstance(value, Tensor)}


def _told(bad: _Watch, batch: Batch, why: str) -> dict[str, Any]:
    samples = rollout_rows(batch.rows, bad.scores, len(bad.scores.texts))
    return {"step": bad.step, "kl_coef": bad.kl_coef, "why": why, "metrics": dict(bad.metrics), "samples": samples}
