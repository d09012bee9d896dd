"""The Slurm script of cluster/ on a real Slurm of two simulated hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster import toy_slurm
from tests.cluster.page import lines_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
RUN: dict[str, Any] = {
    "device": "cpu",
    "steps": STEPS,
    "model": {
        "path": "scratch:qwen2",
        "tokenizer": {"path": "scratch:char"},
        "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16},
    },
    "data": {"path": "rows.jsonl", "eval_size": 2, "max_length": 16},
    "learner": {"batch_size": 4, "lr": 1e-3},
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
    # A step a second, until the notice has come: the job is stopped in the midst, however fast the machine is.
    "logging": {"loggers": [], "observers": ["slow.py:slow"]},
}
SLOW = """
import pathlib, time
def slow(record):
    if not pathlib.Path("requeued").exists():
        time.sleep(1)
"""
# A rank on each host: a host has CPUs for one of them only.
ON_TWO_HOSTS = ["learner.engine=deepspeed", "learner.world_size=2", "learner.zero_stage=2", "ray.cpus_per_worker=2"]


# Stand-ins: a head that listens; a run that takes its orders from files, and knows SIGTERM.
RAY = """#!/bin/sh
echo "$(hostname): ray $*" >> asked
case "$*" in *--head*) exec {python} -c '
import socket, sys, time
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
time.sleep(1000)
' "$(echo "$*" | sed 's/.*--port=\\([0-9]*\\).*/\\1/')" ;; esac
exec sleep 1000
"""
RUN_OF_STAND_INS = """#!/bin/bash
echo "$(hostname): rlhf-ray $*" >> asked
trap 'echo noticed >> asked; exit 130' TERM
touch started
while [ ! -e status ]; do sleep 0.05; done
exit "$(cat status)"
"""


@pytest.fixture
def slurm(simulated_hosts):
    if problem := toy_slurm.why_not():
        pytest.skip(problem)
    folder = Path(f"/tmp/rlhf-ray-{toy_slurm.FIRST_JOB}")  # where the script puts Ray's files: each host its own
    with toy_slurm.running(simulated_hosts(2, own=[str(folder)]), cpus=2) as running:
        yield running
    folder.rmdir()


@pytest.fixture
def submit(slurm, tmp_path) -> Callable[..., str]:
    """`submit("rl", "run.yaml", env=...)`: the script with these words, in a folder of its own; the job's number."""

    def make(*words: str, env: Mapping[str, str]) -> str:
        command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=2", f"--output={tmp_path}/job.out"]
        return slurm(*command, str(ROOT / "cluster" / "slurm.sbatch"), *words, env=env, cwd=tmp_path)

    return make


def begins_again(slurm: toy_slurm.Slurm, job: str, times: int) -> None:
    """Slurm would wait two minutes. So long a node may refuse a job that it has ended, or not ended yet; it looks at
    the second in which it has."""
    slurm.wait_for(f"Restarts={times}", "scontrol", "show", "job", job)
    slurm.wait_until_idle()
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def appears(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until, f"no {file}; {told(file.parent)}"
        time.sleep(0.05)


def asked(folder: Path, lines: int) -> list[str]:
    """What the stand-ins were asked, once it is so many lines: nodes do not wait for one another."""
    until = time.monotonic() + 60
    while len(said := (folder / "asked").read_text().splitlines()) < lines:
        assert time.monotonic() < until, f"{said}; {told(folder)}"
        time.sleep(0.05)
    return said


def told(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.out")))


def rows_of(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_job_has_head_worker_and_run_and_begins_again_after_a_notice_or_a_fault(slurm, submit, commands, tmp_path):
    path = commands(RAY.format(python=sys.executable), RUN_OF_STAND_INS)
    job = submit("rl", "run.yaml", "steps=7", env={"PATH": path, "REQUEUES": "2"})
    appears(tmp_path / "started")
    port = 20000 + int(job) % 10000
    head = f"10.91.0.1:{port}"
    assert sorted(asked(tmp_path, 3)) == [
        f"h1: ray start --block --head --node-ip-address=10.91.0.1 --port={port} --num-cpus=2 "
        "--include-dashboard=false",
        f"h1: rlhf-ray rl run.yaml steps=7 executor=ray ray.address={head} --run-dir runs/rlhf-ray-{job} --resume auto",
        f"h2: ray start --block --address={head} --num-cpus=2",
    ]
    (tmp_path / "started").unlink()
    slurm("scancel", "--batch", "--signal=USR1", job)
    begins_again(slurm, job, 1)
    assert asked(tmp_path, 4)[3] == "noticed"
    assert "rlhf-ray ended with status 130 after notice (requeue)" in told(tmp_path)
    # The same command again; something under it fails, and once more.
    appears(tmp_path / "started")
    assert (tmp_path / "asked").read_text().count(f"--run-dir runs/rlhf-ray-{job} --resume auto") == 2
    (tmp_path / "status").write_text("75")
    begins_again(slurm, job, 2)
    # REQUEUES is 2: that was the last.
    shown = slurm.wait_for("JobState=FAILED", "scontrol", "show", "job", job)
    assert "ExitCode=75:0" in shown and "Restarts=2" in shown


@pytest.mark.slow
def test_the_lines_of_the_page(slurm, commands, tmp_path):
    """docs/cluster.md, but for the number of GPUs and the folder. What it says of each line comes true."""
    path = {"PATH": commands(RAY.format(python=sys.executable), RUN_OF_STAND_INS)}
    submit, requeue, end = [words for comment, words in lines_of("With Slurm")]
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    changed = {"--gpus-per-node=8": "--gpus-per-node=2", "/shared/runs/1": f"{tmp_path}/runs/1"}
    said = slurm(*(changed.get(word, word) for word in submit), env=path, cwd=tmp_path)
    job = re.fullmatch(r"Submitted batch job (\d+)", said)[1]
    appears(tmp_path / "started")
    assert (tmp_path / "asked").read_text().count(f"--run-dir {tmp_path}/runs/1") == 1, "the one that was given"
    (tmp_path / "started").unlink()
    slurm(*(word.replace("JOB", job) for word in requeue))
    begins_again(slurm, job, 1)
    appears(tmp_path / "started")
    slurm(*(word.replace("JOB", job) for word in end))
    shown = slurm.wait_for("JobState=FAILED", "scontrol", "show", "job", job)
    assert "ExitCode=130:0" in shown and "Restarts=1" in shown
    assert "rlhf-ray ended with status 130 after notice (end)" in (tmp_path / f"slurm-{job}.out").read_text()


@pytest.mark.system
def test_a_job_trains_on_two_nodes_is_stopped_with_notice_requeued_and_resumes(slurm, submit, commands, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "slow.py").write_text(SLOW)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    environment = {"PATH": commands(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = submit("sft", "run.yaml", *ON_TWO_HOSTS, "--run-dir", str(run), env=environment)
    until = time.monotonic() + 600
    while len(rows_of(run)) < 2:
        state = slurm("squeue", "-h", "-j", job, "-o", "%T")
        assert state in ("PENDING", "CONFIGURING", "RUNNING") and time.monotonic() < until, f"{state}\n{told(tmp_path)}"
        time.sleep(0.2)
    slurm("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for("Restarts=1", "scontrol", "show", "job", job)
    assert "rlhf-ray ended with status 130 after notice (requeue)" in told(tmp_path)
    stopped = len(rows_of(run))
    assert 2 <= stopped < STEPS and (run / "checkpoints" / f"step_{stopped}").is_dir()
    (tmp_path / "requeued").touch()
    begins_again(slurm, job, 1)
    slurm.wait_for("JobState=COMPLETED", "scontrol", "show", "job", job, seconds=600)

    assert [row["step"] for row in rows_of(run)] == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [stopped]
    # Where it was done, and that it was stopped, makes no difference to what was learned.
    command = [sys.executable, "-m", "rlhf_ray.cli", "sft", "run.yaml", "--run-dir", "alone"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    here, there = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "alone", run))
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)
