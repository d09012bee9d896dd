"""`--restart N`: the command in a process of its own, started again with `--resume auto` where that may help."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from rlhf_ray import pulse
from rlhf_ray.commands.options import interruptible
from rlhf_ray.errors import AGAIN, INTERRUPTED, UNEXPECTED
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.directory import append_event, folder_for
from rlhf_ray.run.stopping import SIGNALS

if TYPE_CHECKING:
    from rlhf_ray.config.sections import RayConfig, TrainingRunConfig

# Whatever has failed may need a moment: a machine that comes back, a disk that somebody clears.
PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
# How often to look whether the process is there: one that it has started may hold its line open.
LOOK_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How a command has ended: its exit status, or minus the signal; and in words. `asked`: to stop, before."""

    status: int
    how: str
    asked: bool = field(default=False, compare=False)

    @property
    def may_help(self) -> bool:
        """To start again: infrastructure failed, or something killed the process that was no signal for stopping it.
        But whoever has asked for an end wants no restart: a job that is ended takes the run's workers with it."""
        return not self.asked and (self.status == AGAIN or (self.status < 0 and -self.status not in SIGNALS))


def restarting(
    command: str, settings: TrainingRunConfig, config: Path, overrides: Sequence[str], run_dir: Path | None,
    resume: bool, times: int, *,
    run: Callable[[Sequence[str]], Ended] | None = None, sleep: Callable[[float], None] = time.sleep,
) -> int:  # fmt: skip
    """Run the command until it ends with a status that no restart would change; returns that.

    Args:
        settings: the command's, as `config` and `overrides` give them.
        times: so many restarts in a row; a new checkpoint in between, and they count anew.
    """
    folder = folder_for(settings.name, run_dir, resume=resume)
    failures, run = 0, run or partial(run_child, start_s=settings.ray.start_deadline_s)
    while True:
        saved = _newest(folder)
        mode = "auto" if resume or failures else "never"
        ended = run([command, str(config), *overrides, "--run-dir", str(folder), "--resume", mode])
        if ended.status == UNEXPECTED and not ended.asked and _without_a_word(folder):
            ended = Ended(AGAIN, "a library ended the process (Ray does so a minute after its head is gone)")
        if not ended.may_help:
            return ended.status if ended.status >= 0 else INTERRUPTED
        failures = 1 if _newest(folder) > saved else failures + 1
        if failures > times:
            what = f"after {times} restart{'s' * (times != 1)} without a new checkpoint this is the end"
            print(f"rlhf-ray: {ended.how}; {what}", file=sys.stderr)
            return AGAIN
        pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
        print(f"rlhf-ray: {ended.how}; restart {failures} of {times} in {pause:g} s", file=sys.stderr, flush=True)
        sleep(pause)
        if folder.is_dir():
            append_event(folder / "events.jsonl", "restarted", restart=failures, reason=ended.how)


def restart_and_exit(
    command: str, settings: TrainingRunConfig, config: Path, overrides: Sequence[str], run_dir: Path | None,
    resume: bool, times: int,
) -> NoReturn:  # fmt: skip
    """`restarting` as the whole of a command."""
    with interruptible():
        raise typer.Exit(restarting(command, settings, config, overrides, run_dir, resume, times))


def run_child(arguments: Sequence[str], start_s: float) -> Ended:
    """`rlhf-ray <arguments>` to its end. Ctrl-C and SIGTERM are passed on; if it gives no sign of life, it is killed.

    Args:
        start_s: seconds until the first sign of life.
    """
    hears, gives = os.pipe()
    # In a session of its own, or a terminal's Ctrl-C would reach it twice and count as the second one.
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.cli", *arguments], start_new_session=True, pass_fds=[gives],
        env={**os.environ, pulse.VARIABLE: str(gives)},
    )  # fmt: skip
    os.close(gives)
    child = Child(process, hears)
    before = {number: signal.signal(number, child.pass_on) for number in SIGNALS}
    try:
        hangs = child.listen(start_s)
        if hangs:
            print(f"rlhf-ray: {hangs}", file=sys.stderr, flush=True)
            process.kill()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(hears)
    asked = bool(child.stops)
    if status < 0 and asked:  # it could not obey
        return Ended(INTERRUPTED, f"killed by {signal.Signals(-status).name} after it was to stop", asked)
    killed = hangs or (f"killed by {signal.Signals(-status).name}" if status < 0 else None)
    return Ended(status, killed or f"exit status {status}", asked)


class Child:
    """A command under way, and the line on which it gives signs of life."""

    def __init__(self, process: subprocess.Popen[bytes], hears: int) -> None:
        self.process = process
        self.stops: list[int] = []  # signals for stopping it, in order
        self._hears = hears
        self._asked = 0  # so many of them it knows of
        self._told_at = 0.0

    def pass_on(self, number: int, frame: object) -> None:
        """A scheduler may signal every process of a job, and two would mean `at once`: SIGTERM waits for a moment."""
        self.stops.append(number)
        self._told_at = time.monotonic()
        if number != signal.SIGTERM:
            self._asked += 1
            self.process.send_signal(number)

    def listen(self, patience: float) -> str | None:
        """Waits until the process has ended, or hangs: what is to be said of it then."""
        wait, since = patience, time.monotonic()
        while self.process.poll() is None:
            if len(self.stops) > self._asked and time.monotonic() > self._told_at + LOOK_S:
                self._asked += 1
                self.process.send_signal(signal.SIGTERM)
            asked, began = max(0.0, min(LOOK_S, since + wait - time.monotonic())), time.monotonic()
            ready, _, _ = select.select([self._hears], [], [], asked)
            if not ready:
                # Whoever stops all processes of a job stops this one, too: that time does not count.
                since += max(0.0, time.monotonic() - began - asked - LOOK_S)
                if time.monotonic() >= since + wait:
                    return f"process {self.process.pid} gave no sign of life for {wait:.0f} s, and is killed"
                continue
            lines = os.read(self._hears, 65536).splitlines()
            if not lines:
                self.process.wait()
                return None
            since = time.monotonic()
            for word, number in (line.split() for line in lines):
                if word == b"stuck":
                    idle = f"it has done nothing for {float(number):.0f} s"
                    return f"process {self.process.pid} waits for itself: {idle}, and is killed"
                if word == b"asked":
                    self._asked = max(self._asked, int(number))
                else:
                    wait = float(number)
        return None


def watched(ray: RayConfig) -> AbstractContextManager[None]:
    """Signs of life inside, for `run_child`."""
    return pulse.given(ray.pulse_s, ray.silence_s, ray.start_deadline_s, ray.call_deadline_s)


def _without_a_word(folder: Path) -> bool:
    """Whether the run there began, and its process ended otherwise than by an error that Python saw: that is in its
    summary, and a run that goes on has none."""
    return (folder / "events.jsonl").exists() and not (folder / "summary.json").exists()


def _newest(folder: Path) -> int:
    return max(Checkpoints(folder / "checkpoints").steps(), default=0)
