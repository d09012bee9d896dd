"""`rlhf-ray` as a user runs it: a process of its own, with no network to fall back on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Finished:
    """A run that ended well."""

    run_dir: Path
    summary: dict[str, Any]
    output: str

    @property
    def steps(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


RunCommand = Callable[..., Finished]


@pytest.fixture(scope="session")
def rlhf_ray(repo_root: Path) -> RunCommand:
    """`rlhf_ray("rl", "configs/a.yaml", "steps=3", run_dir=folder)`: to its end, which must be a good one."""

    def run(*arguments: str, run_dir: Path, threads: int = 1) -> Finished:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(THREADS, str(threads))}
        command = [sys.executable, "-m", "rlhf_ray.cli", *arguments, "--run-dir", str(run_dir)]
        done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return Finished(run_dir, json.loads((run_dir / "summary.json").read_text(encoding="utf-8")), done.stdout)

    return run
