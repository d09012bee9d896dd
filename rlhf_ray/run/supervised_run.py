"""A supervised run: the same run directory, checkpoints and observers, with a row of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.run.training_run import TrainingRun

_PARTS = ("step", "update", "ckpt", "eval")


class SupervisedRun(TrainingRun):
    config: SupervisedConfig

    def log_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """One finished step, for all observers; `samples`: prompts and completions, where some are due."""
        metrics = {**dict.fromkeys((f"time/{part}" for part in _PARTS), 0.0), **metrics, **self.timer.take()}
        seconds = max(metrics["time/step"], 1e-9)
        metrics["perf/tokens_per_s"] = metrics["tokens"] / seconds
        metrics["perf/samples_per_s"] = self.config.learner.batch_size / seconds
        self.tell(step, metrics, samples)

    def shows_samples(self, step: int) -> bool:
        """Whether completions are due after this step."""
        return self.screen.shows_samples(step)

    def show_validation(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        # Of a source only the loss: the other numbers are in metrics.jsonl.
        shown = "  ".join(
            f"{name} {value:.4f}" for name, value in metrics.items()
            if not name.startswith("source/") or name.endswith("/loss")
        )  # fmt: skip
        self.note(f"step {step}: {shown}" + ("  (best so far)" if best else ""))
