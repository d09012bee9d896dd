"""What is started again and what is not; no run is started here."""

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from rlhf_ray import pulse
from rlhf_ray.commands import restart
from rlhf_ray.commands.restart import Ended, restarting, run_child
from rlhf_ray.config.sections import ModelConfig, TrainingRunConfig

SETTINGS = TrainingRunConfig(name="tiny", model=ModelConfig(path="scratch:qwen2"))


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
            status = statuses[len(commands) - 1]
            return Ended(status, f"ended with {status}")

        status = restarting(
            "rl", SETTINGS, "a.yaml", ["seed=1"], tmp_path / "run", False, times, run=run, sleep=pauses.append
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
    assert [e["reason"] for e in events] == ["ended with 75", "ended with -9"]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 4, 130])
def test_what_a_restart_would_not_change_is_the_end(ended, status):
    assert ended([status, 0])[0] == status


@pytest.mark.parametrize(("left", "again"), [
    ((), False), (("events.jsonl",), True), (("events.jsonl", "summary.json"), False)
], ids=["before the run", "in its midst", "by an error"])  # fmt: skip
def test_a_run_that_a_library_has_ended_goes_on(ended, tmp_path, left, again):
    """Ray's C++ ends the driver with status 1, a minute after its head is gone: nobody could write a summary."""
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    status, commands, _ = ended([1, 0])
    assert (status, len(commands)) == ((0, 2) if again else (1, 1))


@pytest.mark.parametrize("status", [-signal.SIGTERM, -signal.SIGINT])
def test_one_that_was_stopped_by_a_signal_was_interrupted(ended, status):
    assert ended([status, 0])[0] == 130


def test_it_gives_up_and_a_new_checkpoint_counts_anew(ended, capsys):
    assert ended([75] * 3, times=2)[0] == 75
    assert "after 2 restarts without a new checkpoint" in capsys.readouterr().err


def test_a_new_checkpoint_counts_anew(ended):
    status, commands, pauses = ended([75, 75, 75, 75, 0], times=2, saves={3: 8})
    assert status == 0 and len(commands) == 5 and pauses == [10.0, 20.0, 10.0, 20.0]


def test_the_last_of_several_kills_is_told_as_try_again(ended):
    assert ended([-signal.SIGKILL] * 2, times=1)[0] == 75


@pytest.fixture
def child(monkeypatch):
    """child(code): how a process that runs this ends in the place of the command."""
    real = restart.subprocess.Popen

    def run(code):
        monkeypatch.setattr(restart.subprocess, "Popen", lambda _, **how: real([sys.executable, "-c", code], **how))
        return run_child([], start_s=60)

    return run


@pytest.mark.slow
def test_a_signal_is_passed_on(child, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def stop():
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(130)); open('up','w'); time.sleep(60)"
    assert child(code) == Ended(130, "exit status 130")


# Stops at the second signal, as a run does: the first one is for its step.
OBEYS = """
import signal, sys, time
from rlhf_ray import pulse
from rlhf_ray.run.stopping import Stop
with pulse.given(0.05, 60, 60, 60):
    stop = Stop()
    stop.listen()
    open("up", "w").write(str(__import__("os").getpid()))
    end = time.monotonic() + {seconds}
    while time.monotonic() < end and not (stop.requested and {soon}):
        time.sleep(0.05)
    sys.exit(100 + stop.requested)
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, False], ids=["to every process", "to the supervisor"])
def test_sigterm_counts_once_whoever_it_was_sent_to(child, monkeypatch, tmp_path, every):
    """`ray job stop` and `scancel` signal all processes of a job. Twice would leave the step without its checkpoint."""
    monkeypatch.chdir(tmp_path)

    def stop():
        while not (tmp_path / "up").exists() or not (pid := (tmp_path / "up").read_text()):
            time.sleep(0.05)
        for process in [os.getpid(), *([int(pid)] if every else [])]:
            os.kill(process, signal.SIGTERM)

    threading.Thread(target=stop).start()
    # A step of 4 s after the signal; told by the supervisor alone, it ends at the first one.
    assert child(OBEYS.format(seconds=6 if every else 60, soon=not every)).status == 101


@pytest.mark.slow
def test_whoever_cannot_obey_is_not_started_again(child, monkeypatch, tmp_path):
    """It was to stop, and then somebody lost patience."""
    monkeypatch.chdir(tmp_path)

    def stop():
        while not (tmp_path / "up").exists() or not (pid := (tmp_path / "up").read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        while not (tmp_path / "asked").exists():
            time.sleep(0.05)
        os.kill(int(pid), signal.SIGKILL)

    threading.Thread(target=stop).start()
    code = (
        "import os,signal,time; signal.signal(15, lambda *_: open('asked','w'))\n"
        "open('up','w').write(str(os.getpid()))\nwhile True: time.sleep(1)"
    )
    ended = child(code)
    assert ended.status == 130 and not ended.may_help


@pytest.mark.slow
@pytest.mark.parametrize("status", [75, 1], ids=["its workers", "Ray"])
def test_one_that_was_to_stop_and_was_lost_instead_is_not_started_again(child, monkeypatch, tmp_path, status):
    """A job that is ended takes the run's workers, or Ray's head, with it."""
    monkeypatch.chdir(tmp_path)
    code = (
        "import os,signal,sys,time; from pathlib import Path; signal.signal(15, lambda *_: sys.exit(%d))\n"
        "Path('run').mkdir(); Path('run/events.jsonl').touch(); os.kill(os.getppid(), 15); time.sleep(60)"
    )
    starts = []

    def run(arguments):
        starts.append(arguments)
        return child(code % status)

    assert restarting("rl", SETTINGS, "a.yaml", [], tmp_path / "run", False, 3, run=run, sleep=starts.append) == status
    assert len(starts) == 1


# Signs of life every 0.05 s; one that was alive may be silent for 0.5 s more, and nothing done for 0.5 s is stuck.
LIVING = """
import os, signal, subprocess, sys, threading, time
from rlhf_ray import pulse
with pulse.given({every}, {silence}, 60, {stuck}):
    pulse.begin()
    {code}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("silence", "stuck", "code", "how"), [
    (0.5, 60, "time.sleep(0.3); os.kill(os.getpid(), signal.SIGSTOP)", "gave no sign of life for 1 s, and is killed"),
    (60, 0.5, "lock = threading.Lock(); lock.acquire(); lock.acquire()", "waits for itself"),
    (60, 0.5, "time.sleep(0.3); import re; re.match('(a+)+$', 'a' * 60 + 'b')", "gave no sign"),
], ids=["stopped", "dead-locked", "holds Python's lock"])  # fmt: skip
def test_one_that_hangs_is_killed_and_may_be_started_again(child, capfd, silence, stuck, code, how):
    silence = 0.5 if "re.match" in code else silence
    ended = child(LIVING.format(every=0.05, silence=silence, stuck=stuck, code=code))
    assert ended.status == -signal.SIGKILL and ended.may_help
    assert how in ended.how and how in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("code", [
    "end = time.process_time() + 1.5\n    while time.process_time() < end: pass",
    "[(pulse.beat(), time.sleep(0.1)) for _ in range(15)]",
], ids=["computes", "waits for a call"])  # fmt: skip
def test_a_long_step_is_no_hang(child, code):
    ended = child(LIVING.format(every=0.05, silence=60, stuck=0.5, code=code + "\n    sys.exit(7)"))
    assert ended == Ended(7, "exit status 7")


@pytest.mark.slow
def test_what_a_run_starts_itself_does_not_speak_for_it(child):
    """Its child holds the line open and knows nothing of it; the end is seen nevertheless."""
    code = (
        "assert pulse.VARIABLE not in os.environ\n"
        "    if os.fork(): os._exit(5)\n"
        "    time.sleep(4)"
    )
    assert child(LIVING.format(every=0.05, silence=60, stuck=60, code=code)).status == 5


def test_a_supervisor_that_was_stopped_itself_does_not_count_that_time(monkeypatch):
    """A scheduler stops all processes of a job for ten minutes, and may let this one go on first."""
    now, looks = [0.0], []

    def select(readable, *_):
        looks.append(now[0])
        now[0] += 600 if len(looks) == 2 else 1
        return (readable if len(looks) == 1 else []), [], []

    monkeypatch.setattr(restart.select, "select", select)
    monkeypatch.setattr(restart.os, "read", lambda *_: b"alive 40\n")
    monkeypatch.setattr(restart.time, "monotonic", lambda: now[0])
    process = SimpleNamespace(pid=1, poll=lambda: None)
    assert restart.Child(process, 0).listen(60) == "process 1 gave no sign of life for 40 s, and is killed"
    assert len(looks) == 2 + 38, "of the ten minutes two seconds count"


@pytest.mark.parametrize(("begun", "waits", "says"), [
    (True, [5] * 21, "stuck 105"),
    (True, [5, 600, *[5] * 20], "stuck 105"),  # what the ten minutes are does not count
    (False, [5] * 60, None),
    (False, [5] * 81, "stuck 405"),
], ids=["stuck", "stopped by a scheduler", "waits for machines", "stuck before it has begun"])  # fmt: skip
def test_a_run_that_waits_for_machines_or_was_stopped_is_not_stuck(monkeypatch, begun, waits, says):
    now, left, said = [0.0], list(waits), []

    def wait(seconds):
        now[0] += left.pop(0) if left else 0
        return not left

    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "computed_s", lambda: 0.0)
    monkeypatch.setattr(pulse.faulthandler, "dump_traceback", lambda **_: None)
    living = pulse.Pulse(0, every_s=5, silence_s=35, start_s=300, stuck_s=100)
    living._began, living._over = begun, SimpleNamespace(wait=wait)
    left.append(5)
    living.say = lambda word, number: said.append(f"{word} {number:g}")
    living._give()
    assert [one for one in said if one.startswith("stuck")] == ([says] if says else [])
