"""How long things take on this machine, each in a process of its own; no test asserts a time.

    python benchmarks/seconds.py [import help dry-run cartpole quickstart busy preferences]

`busy` is the quickstart beside a busy loop on each of half the cores; it should take at most 2.5 times `quickstart`.
Without names everything is measured, in this order: a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLI = ("-m", "rlhf_ray.cli")
MOST_BUSY = 2.5  # times the idle quickstart's seconds


def run(*arguments: str) -> float:
    """Seconds of a Python process that ends well."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - started


def best(*arguments: str, times: int = 5) -> float:
    """Seconds of the fastest: what else the machine does makes single measurements longer, never shorter."""
    return min(run(*arguments) for _ in range(times))


def whole_run(*arguments: str) -> float:
    """Seconds of a command as its summary has them: without its imports."""
    with tempfile.TemporaryDirectory() as folder:
        run(*CLI, *arguments, "--run-dir", f"{folder}/run")
        return float(json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))["seconds"])


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """A loop pinned to each of half the cores."""
    loops = []
    try:
        for core in range(max(1, (os.cpu_count() or 1) // 2)):
            pin = f"import os; hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, {{{core}}})"
            loops.append(subprocess.Popen([sys.executable, "-c", f"{pin}\nwhile True: pass"]))
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def busy_quickstart() -> float:
    with busy_cores():
        return whole_run("quickstart")


MEASUREMENTS: dict[str, tuple[str, Callable[[], float]]] = {
    "import": ("import rlhf_ray.cli, best of 5", lambda: best("-c", "import rlhf_ray.cli")),
    "help": ("rlhf-ray --help, best of 5", lambda: best(*CLI, "--help")),
    "dry-run": ("rlhf-ray rl configs/grpo_arithmetic.yaml --dry-run, best of 3",
                lambda: best(*CLI, "rl", "configs/grpo_arithmetic.yaml", "--dry-run", times=3)),
    "cartpole": ("examples/cartpole.py", lambda: run("examples/cartpole.py")),
    "quickstart": ("rlhf-ray quickstart", lambda: whole_run("quickstart")),
    "busy": ("the same beside busy loops on half the cores", busy_quickstart),
    "preferences": ("rlhf-ray quickstart --preferences", lambda: whole_run("quickstart", "--preferences")),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(MEASUREMENTS))
    names = parser.parse_args().names or list(MEASUREMENTS)
    if unknown := set(names) - MEASUREMENTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MEASUREMENTS)}")
    found: dict[str, float] = {}
    for name in names:
        title, measure = MEASUREMENTS[name]
        found[name] = measure()
        print(f"{found[name]:8.2f} s   {title}", flush=True)
    if {"quickstart", "busy"} <= found.keys():
        ratio = found["busy"] / found["quickstart"]
        print(f"{ratio:8.2f}     busy / quickstart; at most {MOST_BUSY} is wanted")


if __name__ == "__main__":
    main()
