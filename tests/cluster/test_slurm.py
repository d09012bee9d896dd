"""The Slurm script of cluster/ on a real Slurm of two simulated hosts."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.cluster import toy_slurm
from tests.cluster.page import lines_of

ROOT = Path(__file__).resolve().parents[2]
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
