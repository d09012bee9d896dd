"""How many files a reader crosses who follows one RL step: those of which a function runs, in any process of the run.

    python benchmarks/files_of_a_step.py                    the small arithmetic run, local
    python benchmarks/files_of_a_step.py --ray              driver and workers, on a small cluster of this machine
    python benchmarks/files_of_a_step.py --checkout /path   of another checkout

The run goes on for eight steps, without evaluation and checkpoints; counted is what runs between the ends of the second
and the fifth. Left out are `config/` (settings are read) and `run/timer.py`. `step_listener/` says how it is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTENER = Path(__file__).resolve().parent / "step_listener"
LEFT_OUT = ("config/", "run/timer.py")
FIRST, LAST = 2, 5  # counted is what runs after the end of the one and before the end of the other
SETTINGS = ("steps=8", "warm_start.steps=20", "eval.every=0", "checkpoint.every=0", "device=cpu")
ON_RAY = ("executor=ray", "generator.count=1", "learner.world_size=1")


def seconds_of_steps(process: subprocess.Popen, metrics: Path) -> dict[int, int]:
    """Step -> the millisecond at which its row of metrics.jsonl was there; returns when the run has ended."""
    ends: dict[int, int] = {}
    while process.poll() is None:
        written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        for step in range(len(ends) + 1, written + 1):
            ends[step] = time.monotonic_ns() // 1_000_000
        time.sleep(0.0005)
    return ends


def files_between(out: Path, start: int, end: int) -> dict[str, list[str]]:
    """File -> the processes in which a function of it began in between, by number."""
    found: dict[str, list[str]] = {}
    for process in sorted(out.glob("*.json")):
        for file, times in json.loads(process.read_text()).items():
            if any(start <= moment <= end for moment in times):
                found.setdefault(file, []).append(process.stem)
    return found


def counted(checkout: Path, config: str, settings: list[str]) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory(prefix="step_files_") as folder:
        work = Path(folder)
        (work / "out").mkdir()
        env = {**os.environ, "PYTHONPATH": f"{LISTENER}:{checkout}", "STEP_FILES_OUT": str(work / "out"),
               "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        command = [sys.executable, "-m", "rlhf_ray.cli", "rl", str(checkout / config), *settings]
        with (work / "log").open("w") as log:
            process = subprocess.Popen([*command, "--run-dir", str(work / "run")], cwd=checkout, env=env,
                                       stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
            ends = seconds_of_steps(process, work / "run" / "metrics.jsonl")
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{(work / 'log').read_text()[-3000:]}")
        found = files_between(work / "out", ends[FIRST], ends[LAST])
    return {file: where for file, where in sorted(found.items()) if not file.startswith(LEFT_OUT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings to change, e.g. generator.count=2")
    parser.add_argument("--config", default="configs/grpo_arithmetic.yaml")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    given = parser.parse_args()
    settings = [*SETTINGS, *(ON_RAY if given.ray else ()), *given.settings]
    found = counted(given.checkout.resolve(), given.config, settings)
    for file, processes in found.items():
        print(f"{file:<32} {len(processes)} process{'es' if len(processes) > 1 else ''}")
    print(f"{len(found)} files")


if __name__ == "__main__":
    main()
