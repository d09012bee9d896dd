"""The floor against TRL: the same GRPO job, measured in turns on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAST = 1.0


@pytest.mark.system
@pytest.mark.alone
def test_not_slower_than_trl(tmp_path):
    result = tmp_path / "result.json"
    options = ["--sides", "trl", "ours", "--rounds", "2", "--steps", "8", "--json", str(result)]
    command = [sys.executable, "benchmarks/vs_trl.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    times_trl = json.loads(result.read_text())["times_trl"]
    assert times_trl["ours"] >= LEAST, times_trl
