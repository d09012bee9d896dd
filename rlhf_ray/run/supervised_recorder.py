"""The recorder of a supervised run: the same run directory, checkpoints and clock, with a row of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.run.recorder import Recorder

_PARTS = ("step", "update", "ckpt", "eval")


class SupervisedRecorder(Recorder):
    config: SupervisedConfig

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One finished step: numbers to the loggers, a line to the screen."""
        metrics = {**dict.fromkeys((f"time/{part}" for part in _PARTS), 0.0), **metrics, **self.timer.take()}
        seconds = max(metrics["time/step"], 1e-9)
        metrics["perf/tokens_per_s"] = metrics["tokens"] / seconds
        metrics["perf/samples_per_s"] = self.config.learner.batch_size / seconds
        spent = self.spent
        metrics["cost/hours"], metrics["cost/device_hours"] = spent.seconds / 3600, spent.device_hours
        self.metrics.log(step, metrics)
        self.steps_done = step
        self.progress.update(step, metrics)

    def show_validation(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        # Of a source only the loss: the other numbers are in metrics.jsonl.
        shown = "  ".join(
            f"{name} {value:.4f}" for name, value in metrics.items()
            if not name.startswith("source/") or name.endswith("/loss")
        )  # fmt: skip
        self.progress.note(f"step {step}: {shown}" + ("  (best so far)" if best else ""))

    def show_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        rows = [(sample["prompt"], sample["completion"], None) for sample in samples]
        self.progress.show_samples(step, rows, judged=False)
