"""The GPU smoke script, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.system, pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")]


def test_dry_run(repo_root, tmp_path):
    script, out = repo_root / "benchmarks/gpu/smoke.py", tmp_path / "smoke.json"
    command = [sys.executable, str(script), "--cpu-dry-run", "--out", str(out)]
    command += ["--stages", "environment,deepspeed_train,sync_shared_memory,sync_nccl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    stages = json.loads(out.read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "environment": "ok",
        "deepspeed_train": "ok",
        "sync_shared_memory": "ok",
        "sync_nccl": "skipped",
    }
    for sync in stages["sync_shared_memory"]["syncs"]:
        assert sync["ok"] and sync["absdiff_max"] < 1e-4 < 0.1 < sync["moved"]


def test_unknown_stage(repo_root):
    command = [sys.executable, str(repo_root / "benchmarks/gpu/smoke.py"), "--stages", "teleport"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "choose of environment, vllm_generate" in done.stderr
