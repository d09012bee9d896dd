"""`--restart N`: the command in a process of its own, started again with `--resume auto` where that may help."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_ray.errors import AGAIN
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.directory import append_event, folder_for
from rlhf_ray.run.stopping import SIGNALS

# Whatever has failed may need a moment: a machine that comes back, a disk that somebody clears.
PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0


def restarting(
    command: str, name: str, config: Path, overrides: Sequence[str], run_dir: Path | None, resume: bool, times: int, *,
    run: Callable[[Sequence[str]], int] | None = None, sleep: Callable[[float], None] = time.sleep,
) -> int:  # fmt: skip
    """Run the command until it ends with a status that no restart would change; returns that.

    Args:
        name: the run's, for its folder where none is given.
        times: so many restarts in a row; a new checkpoint in between, and they count anew.
    """
    folder = folder_for(name, run_dir, resume=resume)
    failures, run = 0, run or run_child
    while True:
        saved = _newest(folder)
        mode = "auto" if resume or failures else "never"
        status = run([command, str(config), *overrides, "--run-dir", str(folder), "--resume", mode])
        if not may_help(status):
            return status
        failures = 1 if _newest(folder) > saved else failures + 1
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        if failures > times:
            print(f"rlhf-ray: {how}; after {times} restarts without a new checkpoint this is the end", file=sys.stderr)
            return status if status > 0 else AGAIN
        pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
        print(f"rlhf-ray: {how}; restart {failures} of {times} in {pause:g} s", file=sys.stderr, flush=True)
        sleep(pause)
        if folder.is_dir():
            append_event(folder / "events.jsonl", "restarted", restart=failures, reason=how)


def may_help(status: int) -> bool:
    """Infrastructure failed, or something killed the process that was none of the signals for stopping it."""
    return status == AGAIN or (status < 0 and -status not in SIGNALS)


def run_child(arguments: Sequence[str]) -> int:
    """`rlhf-ray <arguments>`: its exit status, or minus the signal that ended it. Ctrl-C and SIGTERM are passed on."""
    # In a session of its own, or a terminal's Ctrl-C would reach it twice and count as the second one.
    child = subprocess.Popen([sys.executable, "-m", "rlhf_ray.cli", *arguments], start_new_session=True)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in SIGNALS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _newest(folder: Path) -> int:
    return max(Checkpoints(folder / "checkpoints").steps(), default=0)
