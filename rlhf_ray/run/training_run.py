"""One run of a training command from its start to its summary, behind the few calls that a loop makes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray import pulse
from rlhf_ray.clock import Clock
from rlhf_ray.config.load import dump_config
from rlhf_ray.config.redacted import redacted_settings
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import StorageError
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Saves, Scores
from rlhf_ray.run.checkpoint import Checkpoints, Ranking
from rlhf_ray.run.cost import Spent, Workload, spent_before
from rlhf_ray.run.directory import RunDirectory, ended_by
from rlhf_ray.run.loggers import Metrics, Recorder, rollout_rows
from rlhf_ray.run.observer import Alarm, Observer, Observers, StepRecord
from rlhf_ray.run.progress import Screen
from rlhf_ray.run.resume import BEGINNING, changes_to_say, refuse_other_beginnings
from rlhf_ray.run.saver import Saver
from rlhf_ray.run.stopping import Stop
from rlhf_ray.run.storage import opened, read_object, sealed, to_json, write_atomically
from rlhf_ray.run.timer import Timer

# Stand in every row, also where nothing of the kind has happened.
_COUNTS = ("dropped_stale", "fault/restarts", "fault/retries", "fault/dropped")
# Optimiser steps without a finite gradient: of the policy and of the critic.
SKIPPED = ("skipped_steps", "critic/skipped_steps")
_PARTS = (
    "step", "generate", "reward", "ref_logp", "old_logp", "values", "update", "weight_sync", "wait", "ckpt", "eval",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    step: int
    folder: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class Catching:
    """A run that has gone back does steps once more. `until`: as many as were done; `began`: when it went back;
    `seconds`: that this had taken by then, by name."""

    until: int
    began: float
    seconds: Mapping[str, float]


class TrainingRun:
    """The run directory, the checkpoints and the clock of one run, and all who are told of its steps."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, data: Mapping[str, str] | None = None, *,
        observers: Iterable[Observer] = (), clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Args:
            data: fingerprints of the rows by source: what a resumed run must find unchanged.
            observers: who is told of each step beside the screen, the loggers and the run directory.
        """
        self.config = config
        self.directory = directory
        self.clock = clock
        self.timer = Timer(clock)
        self.stop = Stop()
        settings = config.checkpoint
        self.checkpoints = Checkpoints(
            directory.checkpoints, settings.keep, on_event=lambda kind, fields: directory.event(kind, **fields),
            ranking=settings.best_by and Ranking(settings.best_by, settings.keep_best, settings.best_is == "highest"),
        )  # fmt: skip
        self.saver = Saver(self.checkpoints)
        if directory.resumed:
            refuse_other_beginnings(config, directory, checkpoint=bool(self.checkpoints.steps()))
        found = self.checkpoints.latest() if directory.resumed else None
        self.resume_point = None if found is None else ResumePoint(*found)
        said = changes_to_say(config, data, directory) if directory.resumed else {}
        self._beginning: dict[str, Any] = {"config": dump_config(config), "data": dict(data or {})}
        self._row: Mapping[str, float] = {}  # of the last step
        # A run that had finished keeps its results until a step is done that they know nothing of.
        self._results = directory.read_summary() if directory.resumed else {}
        directory.write_config(dump_config(config))
        if data is not None:
            write_atomically(directory.data_file, to_json(data, indent=1) + "\n")
        step = self.resume_point.step if self.resume_point else None
        self.workload = Workload()
        self._restarted: list[str] = []  # since the last step
        self._attempt = 0  # the run goes back, and later steps are those of another attempt
        self._catching: Catching | None = None
        self._spent_before = spent_before(directory) if directory.resumed else Spent()
        self.started = clock()
        if directory.resumed:
            directory.rewind(step or 0, **asdict(self._spent_before))
            for kind, text in said.items():
                directory.event(kind, reason=text)
        else:
            directory.event("started")
        self.steps_done = step or 0
        self.screen = Screen(
            config.name, config.steps, self.steps_done, samples_every=config.logging.samples_every, clock=clock
        )
        loggers = ["jsonl", *config.logging.loggers]
        self.observers = Observers([
            Metrics(directory, loggers, config=redacted_settings(config.model_dump(mode="json")), resume_step=step),
            self.screen, Recorder(directory, config.logging.rollouts), *observers,
        ], self.steps_done)  # fmt: skip
        self.note(f"run directory: {directory.path}" + (f", from step {step}" if step else ""))
        for text in said.values():
            self.note(text)

    def note(self, text: str) -> None:
        """A line for people."""
        self.observers.note(text)

    def warm_start_progress(self) -> Callable[[int, float], None]:
        """A bar of its own for the supervised steps before the run."""
        total = self.config.warm_start.steps
        self.screen.begin("warm start", total)
        return lambda step, loss: self.screen.step(StepRecord(step, total, {"loss": loss}))

    @property
    def spent(self) -> Spent:
        """Time so far, over all parts of the run."""
        return self._spent_before.plus(self.clock() - self.started, self.workload.devices)

    def begin(self) -> None:
        """The steps begin: the time left is reckoned from here."""
        self.screen.begin(self.config.name, self.config.steps, self.steps_done)
        pulse.begin()

    def steps(self, start: int) -> Iterator[int]:
        """The numbers of the steps from `start` on, until the last one, or until somebody has asked the run to stop.

        Raises KeyboardInterrupt in that case, once the step that was going on has ended.
        """
        attempt = self._attempt
        self.stop.listen()
        try:
            for step in range(start, self.config.steps):
                yield step
                self.saver.look()
                self.stop.go()
            self.stop.heed()  # also what came while the last checkpoint, which is always made, was being written
            self.stop.go()
        finally:  # also where the loop leaves early
            if attempt == self._attempt:
                self.stop.forget()

    def go_back(self, seconds: Mapping[str, float]) -> None:
        """To the newest whole checkpoint, or to the beginning: from here on it is a run that was resumed. `seconds`:
        what the loss has cost so far, by name. Raises CheckpointError if there are checkpoints, and none is whole."""
        self._attempt += 1
        self.stop.forget()
        self.saver.drop()  # some of those who were writing are gone
        found = self.checkpoints.latest()
        self.resume_point = None if found is None else ResumePoint(*found)
        step = self.resume_point.step if self.resume_point else 0
        until = max(self.steps_done, self._catching.until if self._catching else 0)
        where = f"the checkpoint of step {step}" if self.resume_point else "the beginning, for there is no checkpoint"
        self.note(f"back to {where}; steps to do again: {until - step}")
        told = {f"{name}_s": round(spent, 3) for name, spent in seconds.items()}
        self.directory.rewind(step, "rewound", **asdict(self.spent), steps_again=until - step, **told)
        self.directory.resumed = True
        self.observers.rewind(step)
        self.timer.take()
        self.steps_done = step
        self._catching = Catching(until, self.clock(), told)
        self._say_if_caught_up()

    def _say_if_caught_up(self) -> None:
        if self._catching is None or self.steps_done < self._catching.until:
            return
        spent = {**self._catching.seconds, "replay_s": round(self.clock() - self._catching.began, 3)}
        self._catching = None
        self.directory.event("caught_up", step=self.steps_done, **spent)
        parts = ", ".join(f"{name.removesuffix('_s')} {value:.1f} s" for name, value in spent.items())
        self.note(f"step {self.steps_done}: as far as before the loss, which has cost: {parts}")

    def is_checkpoint_due(self, step: int) -> bool:
        """After `step` steps: by `checkpoint.every`, at the end, and before a stop. To be asked after each step, for
        the run stops only where this has said so."""
        every = self.config.checkpoint.every
        return self.stop.heed() or step == self.config.steps or bool(every and step % every == 0)

    def log(
        self, step: int, metrics: Mapping[str, float], rows: Rows, scores: Scores, sources: Sequence[str] = ()
    ) -> None:
        """One finished step, for all observers.

        `sources`: the name of each row's source, where there are several.
        """
        nothing = dict.fromkeys([*_COUNTS, *(f"time/{part}" for part in _PARTS)], 0.0)
        restarted = len(self._restarted)
        del self._restarted[:restarted]
        metrics = {**nothing, "fault/restarts": float(restarted), **metrics, **self.timer.take()}
        seconds = max(metrics["time/step"], 1e-9)
        metrics["perf/tokens_per_s"] = int(rows.lengths.sum()) / seconds
        metrics["perf/samples_per_s"] = len(rows) / seconds
        mfu = self.workload.mfu(rows, step - 1, seconds)
        if mfu is not None:
            metrics["perf/mfu"] = mfu
        samples = rollout_rows(rows, scores, len(scores.texts), sources)
        self.tell(step, metrics, samples, [{"step": step, **event} for event in scores.events])

    def tell(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]],
        failures: Sequence[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        """Give the observers a step, with what the run has cost up to there."""
        spent = self.spent
        cost = {"cost/hours": spent.seconds / 3600, "cost/device_hours": spent.device_hours}
        self.steps_done, self._row = step, metrics
        self.observers.step(StepRecord(step, self.config.steps, {**metrics, **cost}, tuple(samples), tuple(failures)))
        self._say_if_caught_up()
        if skipped := sum(int(metrics.get(name, 0)) for name in SKIPPED):
            reason = f"{skipped} optimiser step{'s' * (skipped > 1)} had no finite gradient and moved no weight"
            self.alarm("skipped", f"{reason}; look at the rewards and the learning rate if it comes again", step)

    def alarm(self, kind: str, reason: str, step: int) -> None:
        """Something people should look at. The run goes on."""
        self.observers.alarm(Alarm(kind, reason, step))

    def fault(self, kind: str, worker: str, text: str) -> None:
        """What became of a worker, and what was done about it. May be called from another thread, so that observers of
        a user's own, which are told between two steps, find it in the metrics only."""
        self.directory.event(kind, worker=worker, reason=text)
        self.screen.note(text)
        if kind == "worker_restarted":
            self._restarted.append(worker)

    def remember(
        self, name: str, compute: Callable[[], Mapping[str, Any]],
        fits: Callable[[Mapping[str, Any]], bool] = lambda kept: True, *, again: bool = False,
    ) -> Mapping[str, Any]:  # fmt: skip
        """`compute()`, kept in a file: a resumed run gets what the first one measured, as long as it still `fits`.

        `again`: in a resumed run, too, `compute` gives the same. What it does not is in each checkpoint besides.
        """
        path = self.directory.path / f"{name}.json"
        value = self._remembered(name, path, again) if self.directory.resumed else None
        if value is None or not fits(value):
            if value is None and self.steps_done and not again:
                reason = f"{path} is lost: it is measured now, after step {self.steps_done}, and not at the beginning"
                self.directory.event(f"{name}_lost", reason=reason)
                self.note(reason)
            value = compute()
            write_atomically(path, to_json(sealed(value), indent=1))
        if not again:
            self._beginning[name] = value
        return value

    def _remembered(self, name: str, path: Path, again: bool) -> Mapping[str, Any] | None:
        found = read_object(path)
        if (value := opened(found)) is not None or again:
            return value
        kept = self.checkpoints.small_file(BEGINNING)
        # A file of an older version is not sealed, and its checkpoints hold no copy.
        return kept.get(name, found or None if self.steps_done and not kept else None)

    def save(
        self, step: int, roles: Mapping[str, Saves], state: Mapping[str, Any],
        protect: Collection[int] = (),
    ) -> None:  # fmt: skip
        """A checkpoint; `roles` write into folders of their names, with checkpoint.background behind the next step.
        Raises as `Checkpoints.save` does, or `steps` then does at the end of a later step."""

        def fill(folder: Path) -> None:
            write_atomically(folder / BEGINNING, to_json(self._beginning))

        best_by = self.config.checkpoint.best_by
        if best_by is not None and best_by not in self._row:
            reason = f"checkpoint.best_by={best_by} is no number of this step"
            self.directory.event("checkpoint_not_ranked", step=step, reason=reason)
        # What nothing follows has nothing to wait behind it.
        behind = self.config.checkpoint.background and step < self.config.steps and not self.stop.heed()
        self.saver.save(step, roles, fill, state, protect, self._row, behind=behind)

    def finish(self, status: str, **details: Any) -> None:
        """summary.json, and the loggers closed."""
        summary = {
            "name": self.config.name,
            "run_dir": str(self.directory.path),
            "status": status,
            "steps": self.steps_done,
            "seconds": round(self.spent.seconds, 3),
            "device_hours": self.spent.device_hours,
        }
        try:
            self.directory.write_summary({**summary, **details})
        finally:
            self.close()

    def fail(self, error: BaseException) -> None:
        """`finish` for a run that `error` (or Ctrl-C, or SIGTERM) has ended; never hides that behind one of its own."""
        self.stop.forget()
        if isinstance(error, KeyboardInterrupt):
            self.screen.close()
            self.note(self._after_interruption())
        try:
            if self._results.get("status") == "finished" and self.steps_done == self._results.get("steps"):
                self.directory.event("resume_failed", **ended_by(error))
                self.directory.write_summary(self._results)
                self.close()
            else:
                self.finish(**ended_by(error))
        except StorageError as second:
            warnings.warn(f"the end of the run could not be written down: {second}", stacklevel=2)

    def _after_interruption(self) -> str:
        """What --resume auto will do, for it may be less than people hope."""
        done = f"interrupted after step {self.steps_done} of {self.config.steps}"
        saved = max(self.checkpoints.steps(), default=0)
        if saved:
            return f"{done}; the same command with --resume auto goes on from the checkpoint of step {saved}"
        every = self.config.checkpoint.every
        first = f"the first is due after step {every}" if every else "checkpoint.every=0 makes one at the end only"
        return (
            f"{done}, before its first checkpoint ({first}): the same command with --resume auto begins again at step 0"
            + (", from the policy that is already made" if self.directory.start.is_dir() else "")
        )

    def close(self) -> None:
        self.observers.close()
