"""The run directory: one folder that holds everything a run leaves behind.

    config.yaml  data.json  metrics.jsonl  events.jsonl  summary.json  before.json
    rollouts/step_N.jsonl  checkpoints/step_N/  bad_steps/step_N/  tensorboard/  model/  adapter/
    best_model/  best_adapter/  best.json
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rlhf_ray.config.redacted import redacted, redacted_texts
from rlhf_ray.errors import ConfigError, StorageError
from rlhf_ray.run.storage import (
    append_line,
    explained,
    keep_lines,
    read_lines,
    read_object,
    to_json,
    write_atomically,
)

LOCK = ".lock"
CONTENTS = (
    "config.yaml", "data.json", "metrics.jsonl", "events.jsonl", "summary.json", "before.json", "reference.json",
    "best.json",
    "rollouts", "checkpoints", "bad_steps", "tensorboard", "merged",
    *(f"{folder}{state}" for folder in ("start", "model", "adapter", "best_model", "best_adapter")
      for state in ("", ".unfinished", ".old")),
)  # fmt: skip
MARKS = ("config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints")  # any of these makes a folder a run


class RunDirectory:
    """Paths and files of one run.

    Raises:
        ConfigError: the folder belongs to another run (and `resume` is off), or is no run at all.
        StorageError: it cannot be written.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resumed = _check_free(self.path, resume)
        with explained("the run directory", self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise StorageError(
                    f"{self.path}: no folder can be made there ({error.strerror}); set --run-dir to another place"
                ) from error
        if self.resumed:
            require_alone(self.path)
            # A killed run may have left half a line; the next append would spoil two.
            for path in (self.events_file, self.metrics_file):
                if lost := keep_lines(path, lambda row: True):
                    self.event("lines_lost", file=path.name, lines=lost)

    @classmethod
    def open(cls, name: str, run_dir: str | Path | None = None, *, resume: bool = False,
             root: str | Path = "runs") -> RunDirectory:  # fmt: skip
        """`run_dir` where given; else, to resume, the newest run of that name; else `root/<name>-<time>`."""
        return cls(folder_for(name, run_dir, resume=resume, root=root), resume=resume)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data_file(self) -> Path:
        """Fingerprints of the data's rows, by source."""
        return self.path / "data.json"

    @property
    def best_file(self) -> Path:
        """Which step's weights `best_model` holds, and the number that made them the best."""
        return self.path / "best.json"

    @property
    def best_model(self) -> Path:
        return self.path / "best_model"

    @property
    def best_adapter(self) -> Path:
        return self.path / "best_adapter"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def start(self) -> Path:
        """The policy a run starts from, where it had to be made."""
        return self.path / "start"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """What LoRA has learned, in PEFT's format; `model` has it merged."""
        return self.path / "adapter"

    def write_config(self, yaml_text: str) -> None:
        """The resolved config. A resumed run with other settings is allowed, but never unnoticed.

        Raises ConfigError while another process writes this run.
        """
        require_alone(self.path)
        old = self.config_file.read_text(encoding="utf-8", errors="replace") if self.config_file.is_file() else ""
        if old not in ("", yaml_text):
            diff = difflib.unified_diff(old.splitlines(), yaml_text.splitlines(), lineterm="", n=0)
            changes = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
            self.event("config_changed", changes=changes)
        write_atomically(self.config_file, yaml_text)

    def event(self, kind: str, /, **fields: Any) -> None:
        """A fault, alarm, restart, resume: anything that is not a number of a step."""
        append_event(self.events_file, kind, **fields)

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        append_line(self.metrics_file, {"step": step, **metrics})

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def read_events(self) -> list[dict[str, Any]]:
        return read_lines(self.events_file)

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Completions of one step, one JSON object a line: prompt, completion, rewards and what is known."""
        path = self.rollouts / f"step_{step}.jsonl"
        with explained("rollouts", path):
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(to_json(row) + "\n" for row in rows))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The last that a run writes: from here on another process may go on with it."""
        write_atomically(self.summary_file, to_json(summary, indent=2) + "\n")
        _release(self.path)

    def read_summary(self) -> dict[str, Any]:
        """What summary.json says; {} where there is none that can be read."""
        return read_object(self.summary_file)

    def rewind(self, step: int, kind: str = "resumed", /, **noted: Any) -> None:
        """Forget what came after `step`, the step of the checkpoint the run goes on from.

        The steps that follow will be run and written again; events stay, they did happen. `noted` goes into the event,
        of this kind.
        """
        gone = keep_lines(self.metrics_file, lambda row: isinstance(row.get("step"), int) and row["step"] <= step)
        for path in self.rollouts.glob("step_*.jsonl"):
            number = path.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                path.unlink()
        self.summary_file.unlink(missing_ok=True)  # it told of an end that is no longer the end
        self.event(kind, step=step, metric_rows_dropped=gone, **noted)


def append_event(file: Path, kind: str, /, **fields: Any) -> None:
    """A line of events.jsonl; also of a run that another process has written."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    append_line(file, {"time": now, "event": kind, **redacted_texts(fields)})


def folder_for(name: str, run_dir: str | Path | None, *, resume: bool, root: str | Path = "runs") -> Path:
    """`run_dir` where given; else, to resume, the newest run of that name; else a new `root/<name>-<time>`."""
    if run_dir is None and resume:
        run_dir = newest_run(name, root)
    if run_dir is not None:
        return Path(run_dir)
    return _unused(Path(root) / f"{_safe(name)}-{datetime.now():%Y%m%d-%H%M%S}")


_locks: dict[Path, IO[str]] = {}


def require_alone(folder: Path) -> None:
    """Take the run in `folder` for this process, until its summary; it may take it again. Raises ConfigError.

    The lock is of the kind that a killed process loses and its children do not inherit.
    """
    path = folder.resolve() / LOCK
    if path in _locks and path.exists() and os.path.samestat(os.fstat(_locks[path].fileno()), path.stat()):
        return
    with explained("the lock of the run", path):
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  held until the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise ConfigError(
                f"{folder}: another process ({file.read().strip() or 'unknown'}) is writing this run; wait for its "
                "end, or set --run-dir to a new folder"
            ) from error
        return  # a file system without locks
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[path] = file


def _release(folder: Path) -> None:
    file = _locks.pop(folder.resolve() / LOCK, None)
    if file is not None:
        file.close()


def ended_by(error: BaseException) -> dict[str, str]:
    """What summary.json says of a run that `error` has ended: a person or a scheduler interrupted it, or it failed."""
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted"}
    return {"status": "failed", "error": redacted(f"{type(error).__name__}: {error}")}


def newest_run(name: str, root: str | Path = "runs") -> Path | None:
    """The newest `root/<name>-<time>` of a run that got to its first step, or was stopped or killed; or None."""
    pattern = re.compile(re.escape(_safe(name)) + r"-\d{8}-\d{6}(-\d+)?")
    folder = Path(root)
    runs = [p for p in folder.iterdir() if pattern.fullmatch(p.name)] if folder.is_dir() else []
    runs = [p for p in runs if any((p / mark).exists() for mark in MARKS) and not ended_at_start(p, "failed")]
    return max(runs, key=lambda p: p.name, default=None)  # by the time in the name: a late report touches the folder


def _check_free(path: Path, resume: bool) -> bool:
    """Whether there is a run to go on with; raises where writing would spoil something."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file, not a folder; set --run-dir to a new folder")
    if not path.is_dir() or all(entry.name == LOCK for entry in path.iterdir()):
        return False
    if not any((path / mark).exists() for mark in MARKS):
        raise ConfigError(f"{path}: is not empty and holds no run; a run would mix its files with what lies "
                          "there; set --run-dir to a new or empty folder")  # fmt: skip
    if not resume and ended_at_start(path, "failed", "interrupted"):
        require_alone(path)
        _clear(path)
        return False
    if not resume:
        raise ConfigError(f"{path}: holds another run, and a new one would overwrite it; "
                          "set --run-dir to a new folder, or --resume auto to go on with it")  # fmt: skip
    return True


def ended_at_start(path: Path, *statuses: str) -> bool:
    """Whether the run there ended before its first step, in one of these ways: no step would be lost with it."""
    summary = read_object(path / "summary.json")
    steps = any((path / "checkpoints").glob("step_*")) if (path / "checkpoints").is_dir() else False
    return summary.get("status") in [*statuses] and summary.get("steps") == 0 and not steps


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing else that somebody may have put there."""
    for name in CONTENTS:
        entry = path / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "run"


def _unused(path: Path) -> Path:
    """Two runs started in one second get folders of their own."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


@contextmanager
def kept_only_if_used(directory: RunDirectory) -> Iterator[None]:
    """Bad input leaves no empty folder behind, for `--resume auto` would take it for the newest run."""
    try:
        yield
    except BaseException:
        if not any(directory.path.iterdir()):
            directory.path.rmdir()
        raise
