"""What is kept of each step: its numbers in metrics.jsonl, TensorBoard, W&B, MLflow or trackio; completions and events.

A logger that fails is switched off with one warning and an event; it never stops a run. Those that talk to
a server work behind a queue, so that one that hangs does not hold up a step either.
"""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Scores
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.observer import Alarm, Observer, StepRecord

Numbers = dict[str, float]


class Logger(Protocol):
    """What a destination needs. Any of the two may raise; the run goes on without it."""

    def log(self, step: int, metrics: Numbers) -> None: ...

    def close(self) -> None: ...


class Metrics(Observer):
    """Sends each step's metrics to every logger named.

    Args:
        loggers: of `jsonl`, `tensorboard`, `wandb`, `mlflow`, `trackio`.
        config: what the run was started with, for the loggers that show it.
        resume_step: the last step that stands; TensorBoard hides what it has after it.

    Raises:
        ConfigError: a name that is none of these.
    """

    def __init__(
        self,
        run: RunDirectory,
        loggers: Sequence[str] = ("jsonl", "tensorboard"),
        *,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._run = run
        self._config = dict(config or {})
        self._loggers: dict[str, Logger] = {}
        for name in loggers:
            if name not in LOGGERS:
                raise ConfigError(f"loggers: {name!r} is unknown; it must be one of {', '.join(LOGGERS)}")
        self._open(loggers, resume_step)

    def _open(self, names: Sequence[str], resume_step: int | None) -> None:
        for name in names:
            made = self._attempt(name, lambda name=name: LOGGERS[name](self._run, self._config, resume_step))
            if made is not None:
                self._loggers[name] = made

    def rewind(self, step: int) -> None:
        """As a resumed run does it: what they have of later steps is hidden or written over."""
        self.close()
        self._open(list(self._loggers), step)

    def step(self, record: StepRecord) -> None:
        self.log(record.step, record.metrics)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`metrics`: numbers, or tensors and arrays of one element."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, logger in list(self._loggers.items()):
            self._attempt(name, lambda logger=logger: logger.log(step, numbers))

    def close(self) -> None:
        for name, logger in list(self._loggers.items()):
            self._attempt(name, logger.close)

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._loggers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, ImportError):
                reason += f"; install it with `pip install {error.name or name}`"
            warnings.warn(f"logger {name} is switched off, the run goes on ({reason})", stacklevel=3)
            try:
                self._run.event("logger_disabled", logger=name, reason=reason)
            except Exception as second:  # the disk that failed the logger may fail the event too
                warnings.warn(f"events.jsonl cannot be written either ({second})", stacklevel=3)
            return None


class JsonlLogger:
    """metrics.jsonl: whole numbers stay whole, so that counts read as counts."""

    def __init__(self, run: RunDirectory, config: dict[str, Any], resume_step: int | None) -> None:
        self._run = run

    def log(self, step: int, metrics: Numbers) -> None:
        rows = {name: int(x) if x.is_integer() and abs(x) < 2**53 else x for name, x in metrics.items()}
        self._run.log_metrics(step, rows)

    def close(self) -> None:
        pass


class TensorBoardLogger:
    def __init__(self, run: RunDirectory, config: dict[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge, flush_secs=10)

    def log(self, step: int, metrics: Numbers) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    def __init__(self, run: RunDirectory, config: dict[str, Any], resume_step: int | None) -> None:
        import wandb

        # the run id is the folder's name: a resumed run goes on in the same curves
        self._wandb = wandb.init(project="rlhf-ray", name=run.path.name, id=run.path.name, dir=str(run.path),
                                 config=config, resume="allow")  # fmt: skip

    def log(self, step: int, metrics: Numbers) -> None:
        self._wandb.log(metrics, step=step)

    def close(self) -> None:
        self._wandb.finish()


class MlflowLogger:
    def __init__(self, run: RunDirectory, config: dict[str, Any], resume_step: int | None) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("rlhf-ray")
        mlflow.start_run(run_name=run.path.name)
        mlflow.log_dict(config, "config.json")

    def log(self, step: int, metrics: Numbers) -> None:
        self._mlflow.log_metrics({name.replace("@", "_at_"): x for name, x in metrics.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class TrackioLogger:
    def __init__(self, run: RunDirectory, config: dict[str, Any], resume_step: int | None) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="rlhf-ray", name=run.path.name, config=config, resume="allow")

    def log(self, step: int, metrics: Numbers) -> None:
        self._trackio.log({name: x for name, x in metrics.items() if math.isfinite(x)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class Background:
    """Runs a logger in a thread. `log` never waits; `close` waits at most `patience` seconds."""

    def __init__(self, make: Callable[[], Logger], *, waiting: int = 1000, patience: float = 30.0) -> None:
        self._queue: queue.Queue[tuple[int, Numbers] | None] = queue.Queue(waiting)
        self._patience = patience
        self._error: Exception | None = None
        # a daemon: a thread stuck in somebody's server must not keep a finished run from ending
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True, name="logger")
        self._thread.start()

    def log(self, step: int, metrics: Numbers) -> None:
        self._raise()
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            raise TimeoutError(f"{self._queue.maxsize} steps wait to be sent, and none is taken") from None

    def close(self) -> None:
        if self._error is None:
            try:
                self._queue.put(None, timeout=self._patience)
            except queue.Full:
                raise TimeoutError("the server does not answer; the last steps were not sent") from None
        self._thread.join(self._patience)
        if self._thread.is_alive():
            raise TimeoutError(f"not finished within {self._patience:g} s; last steps may be missing there")
        self._raise()

    def _work(self, make: Callable[[], Logger]) -> None:
        try:
            logger = make()
            while (entry := self._queue.get()) is not None:
                logger.log(*entry)
            logger.close()
        except Exception as error:
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _in_background(kind: type) -> Callable[[RunDirectory, dict[str, Any], int | None], Logger]:
    return lambda run, config, resume_step: Background(lambda: kind(run, config, resume_step))


LOGGERS: dict[str, Callable[[RunDirectory, dict[str, Any], int | None], Logger]] = {
    "jsonl": JsonlLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": _in_background(WandbLogger),
    "mlflow": _in_background(MlflowLogger),
    "trackio": _in_background(TrackioLogger),
}


class Recorder(Observer):
    """Failed rewards and alarms to events.jsonl, the first `rollouts` completions of a step to rollouts/."""

    def __init__(self, directory: RunDirectory, rollouts: int) -> None:
        self.directory = directory
        self.rollouts = rollouts

    def step(self, record: StepRecord) -> None:
        for failure in record.failures:
            fields = dict(failure)
            self.directory.event(fields.pop("kind", "reward_failed"), **fields)
        judged = [row for row in record.samples if "reward" in row]  # a supervised run's are in its summary
        if self.rollouts and judged:
            self.directory.write_rollouts(record.step, judged[: self.rollouts])

    def alarm(self, alarm: Alarm) -> None:
        self.directory.event("alarm", kind=alarm.kind, reason=alarm.reason, step=alarm.step)


def rollout_rows(rows: Rows, scores: Scores, count: int, sources: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The first `count` completions of a step, as in rollouts/step_N.jsonl; with their sources, where there are any."""
    return [
        {
            "prompt_id": int(rows.prompt_id[i]),
            **({"source": sources[i]} if sources else {}),
            "prompt": prompt,
            "completion": completion,
            "reward": float(scores.score[i]),
            "rewards": scores.of_row(i),
            "tokens": int(rows.response_lengths[i]),
            "truncated": bool(rows.truncated[i]),
        }
        for i, (prompt, completion) in enumerate(scores.texts[:count])
    ]
