"""What is started again and what is not; no run is started here."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from rlhf_ray.commands import restart
from rlhf_ray.commands.restart import restarting


@pytest.fixture
def ended(tmp_path):
    """ended(statuses, times, saves={}) -> (status, command lines, pauses); `saves`: step by number of the attempt."""

    def go(statuses, times=3, saves=None):
        commands, pauses = [], []

        def run(arguments):
            commands.append(list(arguments))
            (tmp_path / "run").mkdir(exist_ok=True)
            if step := (saves or {}).get(len(commands)):
                (tmp_path / "run" / "checkpoints" / f"step_{step}").mkdir(parents=True)
            return statuses[len(commands) - 1]

        status = restarting(
            "rl", "tiny", "a.yaml", ["seed=1"], tmp_path / "run", False, times, run=run, sleep=pauses.append
        )
        return status, commands, pauses

    return go


def test_infrastructure_and_a_kill_are_tried_again_from_the_checkpoint(ended, tmp_path):
    status, commands, pauses = ended([75, -signal.SIGKILL, 0])
    assert status == 0 and pauses == [10.0, 20.0]
    assert [command[-1] for command in commands] == ["never", "auto", "auto"]
    assert commands[0][:5] == ["rl", "a.yaml", "seed=1", "--run-dir", str(tmp_path / "run")]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["restart"]) for e in events] == [("restarted", 1), ("restarted", 2)]
    assert [e["reason"] for e in events] == ["exit status 75", "killed by SIGKILL"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, 130, -signal.SIGTERM, -signal.SIGINT])
def test_what_a_restart_would_not_change_is_the_end(ended, status):
    assert ended([status, 0])[0] == status


def test_it_gives_up_and_a_new_checkpoint_counts_anew(ended, capsys):
    assert ended([75] * 3, times=2)[0] == 75
    assert "after 2 restarts without a new checkpoint" in capsys.readouterr().err


def test_a_new_checkpoint_counts_anew(ended):
    status, commands, pauses = ended([75, 75, 75, 75, 0], times=2, saves={3: 8})
    assert status == 0 and len(commands) == 5 and pauses == [10.0, 20.0, 10.0, 20.0]


def test_the_last_of_several_kills_is_told_as_try_again(ended):
    assert ended([-signal.SIGKILL] * 2, times=1)[0] == 75


@pytest.mark.slow
def test_a_signal_is_passed_on(monkeypatch, tmp_path):
    code = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(130)); open('up','w'); time.sleep(60)"
    monkeypatch.chdir(tmp_path)
    real = restart.subprocess.Popen
    monkeypatch.setattr(restart.subprocess, "Popen", lambda _, **how: real([sys.executable, "-c", code], **how))

    def stop():
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert restart.run_child([]) == 130
