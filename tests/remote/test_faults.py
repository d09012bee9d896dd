"""Whole runs that lose a worker, a port or their patience: they end soon, with a name, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlhf_ray.config.load import dump_config
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.remote.crew import Crew
from rlhf_ray.rollout import groups
from rlhf_ray.start.rl import run_rl

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200), pytest.mark.usefixtures("own_ray")]

SHARDED = ("learner.engine=deepspeed", "learner.world_size=2", "learner.zero_stage=2")


def actors(host: str = "") -> list[int]:
    """Processes of this test's own Ray that host a role."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end meanwhile
            if process.name().startswith("ray::") and f"{host}" in process.name() and "Host" in process.name():
                found.append(process.pid)
    return found


@contextmanager
def disturbed(folder: Path, host: str, sign: signal.Signals) -> Iterator[dict[str, float]]:
    """Sends `sign` to the newest process of a host class, once the run has finished a step."""
    report: dict[str, float] = {}
    over = threading.Event()

    def strike() -> None:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            if over.wait(0.1):
                return
        pid = max(actors(host))
        report["pid"] = pid
        os.kill(pid, sign)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield report
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("host", "sign", "name", "overrides"), [
    ("LearnerHost", signal.SIGKILL, r"learner rank [01] \(node", SHARDED),
    ("LearnerHost", signal.SIGSTOP, r"learner rank [01] \(node .* hangs", (*SHARDED, "ray.silence_s=15")),
], ids=["learner rank", "stopped learner rank"])  # fmt: skip
def test_without_restarts_a_lost_worker_ends_the_run(tiny_config, tmp_path, host, sign, name, overrides):
    config = tiny_config("executor=ray", "steps=100000", "ray.restarts=0", *overrides)
    with disturbed(tmp_path / "run", host, sign) as report, pytest.raises(RlhfRayError, match=name) as caught:
        run_rl(config, tmp_path / "run")
    assert f"pid {report['pid']})" in str(caught.value)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and f"pid {report['pid']}" in summary["error"]
    require_no_actors()


STRIKES = {
    ("reward 1", "score"): (2, "reward 1"),
    ("reference 0", "logprobs"): (2, "reference 0"),
    ("learner rank 0", "begin"): (3, "reference 1"),
    ("generator 1", "write"): (4, "generator 1"),
    ("learner rank 0", "learn"): (3, "generator 0"),
}


def test_lost_generators_rewards_and_references_change_no_bit_of_the_result(
    tiny_config, tmp_path, strikes, capsys, monkeypatch
):  # fmt: skip
    """Killed while they write, judge and compute, while they have nothing to do, and while what one of them has
    computed is still to be sent on."""
    monkeypatch.setattr(groups, "LEAST_ROWS", 8)  # three parcels
    options = ("algorithm.kl_coef=0.01", "steps=4", "eval.size=2")
    run_rl(tiny_config(*options), tmp_path / "calm")
    struck = strikes(STRIKES)
    several = ("generator.count=2", "reward.count=2", "reference.count=2")
    run_rl(tiny_config("executor=ray", *several, *options), tmp_path / "run")
    assert sorted(struck) == sorted(map(" ".join, STRIKES))
    said = capsys.readouterr().out
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("calm", "run")]
    assert weights[0] == weights[1], "bit for bit"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    lost = [event for event in events if event["event"] == "worker_lost"]
    assert Counter(event["worker"] for event in lost) == Counter(victim for _, victim in STRIKES.values())
    assert all(f"{event['worker']} (node " in event["reason"] and event["reason"] in said for event in lost)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Nobody waits for a successor that the others can do without: the run may end before it is there.
    restarted = [event["worker"] for event in events if event["event"] == "worker_restarted"]
    assert 0 < sum(row["fault/restarts"] for row in rows) <= len(restarted) <= len(STRIKES)
    require_no_actors()


def require_no_actors() -> None:
    """Every actor of the run is gone, a stopped one too (Ray kills it 5 s after it did not obey)."""
    while actors():  # the test's time limit ends it
        time.sleep(0.2)


def test_a_taken_port_is_named(tiny_config, tmp_path, monkeypatch):
    """The ranks' meeting point is somebody else's."""
    locate = Crew.locate
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def with_that_port(self, deadline):
            return {name: replace(place, port=port) for name, place in locate(self, deadline).items()}

        monkeypatch.setattr(Crew, "locate", with_that_port)
        with pytest.raises(RlhfRayError, match=f"{port}"):
            run_rl(tiny_config("executor=ray", *SHARDED), tmp_path / "run")
    require_no_actors()


# Judges the first step, and after that never answers.
HANGING_REWARD = """
import os, time

HERE = os.path.dirname(__file__)

def count(completions):
    metrics = HERE + "/run/metrics.jsonl"
    if os.path.exists(metrics) and os.path.getsize(metrics):
        open(HERE + "/asked", "w").close()
        time.sleep(10_000)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(("send", "sign"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)],
                         ids=["ctrl-c", "sigterm"])  # fmt: skip
def test_an_interrupted_run_leaves_nothing_behind(tiny_config, tmp_path, monkeypatch, send, sign):
    """A terminal sends Ctrl-C to every process, a scheduler may tell the driver alone. A step is large enough for its
    rewards to be computed in a thread, while others are being written; the second signal waits for none of them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "hangs.py").write_text(HANGING_REWARD)
    reward = f"rewards=[{{function: {tmp_path}/hangs.py:count}}]"
    config = tiny_config("executor=ray", "steps=100000", "rollout.prompts_per_step=32", reward)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "rlhf_ray.cli", "rl", tmp_path / "run.yaml", "--run-dir", tmp_path / "run"]
    run = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "asked").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.2)
        started = psutil.Process(run.pid).children(recursive=True)
        assert len(started) >= 5, "a Ray of its own, and three actors"
        send(run.pid, sign)
        next(line for line in run.stderr if "stopping after this step" in line)
        send(run.pid, sign)
        assert run.wait(120) == 130 and run.stderr.read().endswith("rlhf-ray: interrupted\n")
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    finally:
        run.kill()
    assert not psutil.wait_procs(started, timeout=120)[1]
