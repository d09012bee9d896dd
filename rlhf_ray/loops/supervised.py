"""The supervised loop: SFT, reward model, DPO and classifier, local and on Ray.

    rows of the step -> trainer.step -> (now and then) trainer.evaluate -> log, checkpoint

`trainer` is the role itself or a handle to its actors. Which rows a step takes is a pure function of the seed and
the step, so a resumed run needs nothing but the step.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rlhf_ray.config.supervised import SupervisedConfig, ValidationConfig
from rlhf_ray.data.stream import Part, Stream, stream_over
from rlhf_ray.roles.protocols import Saves
from rlhf_ray.roles.supervised import SplitResult
from rlhf_ray.roles.training import scheduled_rate
from rlhf_ray.run.supervised_run import SupervisedRun

# Rows of the training data that the final weights are judged on, beside the held-out ones.
TRAIN_SAMPLE = 512
FOLDER = "trainer"


class Trainer(Saves, Protocol):
    """What the loop asks; see `roles/supervised.py`."""

    devices: float  # accelerators that it occupies; on CPU, machines
    rejoin: Callable[[], Mapping[str, float]]  # as in `roles.protocols.Roles`

    def step(self, rows: Sequence[int], lr: float) -> dict[str, float]: ...
    def evaluate(self, split: str, limit: int | None = None) -> SplitResult: ...
    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]: ...


@dataclass(frozen=True)
class Batches:
    """Which rows each step takes: `count` rows of data, then `plain_count` rows of plain text after them.

    Every epoch visits each row once, in an order of its own; the plain text has its own epochs. `parts`: the sources
    that the rows of data come from, one after the other. Where they have weights, rows are drawn by these: an epoch
    then is as many rows as all sources have, and the rows of a heavy source come more often than others.
    """

    count: int
    batch_size: int
    seed: int
    plain_count: int = 0
    plain_batch: int = 0
    parts: tuple[Part, ...] = ()

    @cached_property
    def stream(self) -> Stream:
        return stream_over(self.parts or (Part("", self.count),), self.seed)

    @cached_property
    def plain_stream(self) -> Stream:
        return stream_over((Part("plain text", self.plain_count),), self.seed + 1)

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return math.ceil(self.count / (self.batch_size - self.plain_batch))

    def rows(self, step: int) -> list[int]:
        own = self.batch_size - self.plain_batch
        rows = [index for _, index in self.stream.take(step * own, own)]
        if self.plain_batch:
            plain = self.plain_stream.take(step * self.plain_batch, self.plain_batch)
            rows += [self.count + index for _, index in plain]
        return rows

    def progress(self, steps: int) -> dict[str, float]:
        """How often the rows of each source have been gone through after so many steps, as metrics."""
        seen = self.stream.epochs(steps * (self.batch_size - self.plain_batch))
        return {f"source/{part.name}/epochs": epochs for part, epochs in zip(self.parts, seen, strict=False)}


@dataclass(frozen=True)
class Validated:
    """What validation has said so far."""

    best_loss: float = math.inf
    best_step: int | None = None
    worse: int = 0  # validations since the best one

    def after(self, loss: float, step: int, config: ValidationConfig) -> Validated:
        # A loss that is not a number is no improvement.
        if loss < self.best_loss - (config.min_improvement if self.best_step is not None else 0.0):
            return Validated(loss, step)
        return replace(self, worse=self.worse + 1)

    def gives_up(self, config: ValidationConfig) -> bool:
        return config.patience is not None and self.worse >= config.patience


@dataclass(frozen=True)
class SplitEvaluator:
    """Evaluates the weights, before and after: on splits by name, and on prompts to complete."""

    splits: tuple[str, ...]
    prompts: Sequence[Sequence[int]] = ()
    prompt_texts: Sequence[str] = ()
    max_new_tokens: int = 0

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for split in self.splits:
            found = trainer.evaluate(split, TRAIN_SAMPLE if split == "train" else None)
            result |= {f"{split}/{name}": value for name, value in {**found.metrics, **found.details}.items()}
        if self.prompts:
            result["samples"] = self.samples(trainer)
        return result

    def samples(self, trainer: Trainer) -> list[dict[str, str]]:
        texts = trainer.sample(self.prompts, self.max_new_tokens)
        pairs = zip(self.prompt_texts, texts, strict=True)
        return [{"prompt": prompt, "completion": text} for prompt, text in pairs]


def train(
    config: SupervisedConfig, trainer: Trainer, batches: Batches, evaluator: SplitEvaluator, run: SupervisedRun
) -> dict[str, Any]:
    """`config.steps` steps from where `run` stands; the evaluation before and after, and which weights were kept.

    At the end the trainer holds the weights of the lowest validation loss (`eval.keep_best`), else the last ones.
    """
    start, seen = restore(config, trainer, run)
    before = run.remember("before", lambda: evaluator.evaluate(trainer))
    run.begin()
    every = config.eval.every or batches.per_epoch
    for step in run.steps(start):
        if seen.gives_up(config.eval):
            break
        best_before = seen.best_step
        with run.timer("step"), run.timer("update"):
            metrics = trainer.step(batches.rows(step), scheduled_rate(config.learner, step, config.steps))
        metrics |= batches.progress(step + 1)
        last = step + 1 == config.steps
        if "val" in evaluator.splits and (last or (step + 1) % every == 0):
            with run.timer("eval"):
                found = trainer.evaluate("val")
            seen = seen.after(found.metrics["loss"], step + 1, config.eval)
            run.show_validation(step + 1, found.metrics, best=seen.best_step == step + 1)
            metrics |= {f"val/{name}": value for name, value in found.metrics.items()}
        samples: Sequence[dict[str, str]] = ()
        if evaluator.prompts and not last and run.shows_samples(step + 1):
            with run.timer("eval"):
                samples = evaluator.samples(trainer)
        run.log_step(step + 1, metrics, samples)
        improved = config.eval.keep_best and seen.best_step != best_before
        if run.is_checkpoint_due(step + 1) or improved:
            save(step + 1, seen, trainer, run)
    run.saver.finish()
    kept = run.steps_done
    if config.eval.keep_best and seen.best_step not in (None, kept):
        kept = seen.best_step
        trainer.load(folder_of(kept, run))
        run.note(f"back to the weights of step {kept}, whose validation loss {seen.best_loss:.4f} was lowest")
    return {"before": before, "after": evaluator.evaluate(trainer), "kept_step": kept,
            "stopped_early": run.steps_done < config.steps}  # fmt: skip


def folder_of(step: int, run: SupervisedRun) -> Path:
    """The trainer's part of a checkpoint, verified. Raises CheckpointError."""
    _, folder, _ = run.checkpoints.load(run.directory.checkpoints / f"step_{step}")
    return folder / FOLDER


def save(step: int, seen: Validated, trainer: Trainer, run: SupervisedRun) -> None:
    """A complete checkpoint: nothing else is needed to go on bit for bit. The one with the best weights stays."""
    protect = () if seen.best_step is None else (seen.best_step,)
    with run.timer("ckpt"):
        run.save(step, {FOLDER: trainer}, asdict(seen), protect)


def restore(config: SupervisedConfig, trainer: Trainer, run: SupervisedRun) -> tuple[int, Validated]:
    """The step to go on from, 0 for a new run."""
    found = run.resume_point
    if found is None:
        return 0, Validated()
    trainer.load(found.folder / FOLDER)
    seen = Validated(**found.state)
    needed = config.eval.keep_best and seen.best_step is not None
    if needed and not (run.directory.checkpoints / f"step_{seen.best_step}").is_dir():
        warnings.warn(
            f"the checkpoint of step {seen.best_step}, which had the best weights, is gone; the best of what follows "
            "will be kept instead", stacklevel=2,
        )  # fmt: skip
        run.directory.event("best_weights_lost", step=seen.best_step)
        seen = Validated()
    return found.step, seen


def warm_up(
    trainer: Trainer,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    target_accuracy: float | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """SFT steps and nothing else: no validation, no checkpoint.

    The rate falls linearly to a tenth of `lr`. Ends early when `target_accuracy` of the answers of the last four
    batches are what the model would write greedily: a loss says less, for models of equal loss differ in this by a
    half.
    """
    recent: deque[float] = deque(maxlen=4)
    for step in range(steps):
        metrics = trainer.step(batches.rows(step), lr * (1 - 0.9 * step / steps))
        on_step(step + 1, metrics["loss"])
        recent.append(metrics["exact_accuracy"])
        if target_accuracy is not None and len(recent) == recent.maxlen and fmean(recent) >= target_accuracy:
            break
