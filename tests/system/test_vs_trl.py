"""The comparison with TRL starts and finishes; what it measures is for `benchmarks/vs_trl.py` to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.system
def test_the_same_job_runs_on_both_sides(tmp_path):
    result = tmp_path / "result.json"
    options = ["--sides", "trl", "ours", "--rounds", "1", "--steps", "8", "--json", str(result)]
    command = [sys.executable, "benchmarks/vs_trl.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(result.read_text())["times_trl"]["ours"] > 0
