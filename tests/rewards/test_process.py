"""The process that may be killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.process import Child, ChildLost

TARGETS = """
import os, subprocess, sys, time

def make(start=0):
    if start < 0:
        raise ValueError("negative")
    total = start
    def add(order):
        nonlocal total
        if order == "pid": return os.getpid()
        if order == "hang": time.sleep(600)
        if order == "exit": os._exit(3)
        if order == "crash": os.abort()
        if order == "raise": raise KeyError("boom")
        if order == "grandchild":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(os.environ["PID_FILE"], "w").write(str(child.pid))
            time.sleep(600)
        total += order
        return total
    return add
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "child_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    child = Child("child_targets:make", {"start": 10})
    yield child
    child.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    while alive(pid):  # the test's time limit ends it
        time.sleep(0.02)
    return True


def test_it_keeps_its_state_and_is_another_process(child):
    assert child.call(1, 30) == 11 and child.call(2, 30) == 13
    assert child.call("pid", 30) == child.pid != os.getpid()


def test_large_messages(child):
    with pytest.raises(RewardError, match="TypeError"):
        child.call(["x" * 1_000_000] * 8, 30)  # total += a list
    assert child.call(1, 30) == 11


def test_in_a_process_with_many_open_files(child):
    """A server with a thousand connections, or a Ray worker: select() knows file numbers below 1024 only."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1300:
        pytest.skip("this shell may open too few files")
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert child.call(1, 30) == 11
    finally:
        for file in many:
            os.close(file)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("hang", "did not return within 0.5 s, and its process was killed"),
        ("exit", "lost its process, which ended with exit status 3"),
        ("crash", "lost its process, which died of SIGABRT"),
    ],
)
def test_a_lost_child_is_reported_and_replaced(child, order, says):
    assert child.call(5, 30) == 15
    pid = child.pid
    with pytest.raises(ChildLost, match=says) as caught:
        child.call(order, 0.5)
    assert caught.value.timed_out == (order == "hang")
    assert gone(pid)
    assert child.call(1, 30) == 11, "a new one, with a new state"


def test_what_the_function_has_started_is_killed_too(child, tmp_path):
    with pytest.raises(ChildLost):
        child.call("grandchild", 1.0)
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_exception_leaves_it_alive(child):
    pid = child.call("pid", 30)
    with pytest.raises(RewardError, match="KeyError: 'boom'"):
        child.call("raise", 30)
    assert child.pid == pid and child.call(1, 30) == 11


def test_a_maker_that_fails(child):
    with pytest.raises(RewardError, match="ValueError: negative"):
        Child("child_targets:make", {"start": -1}).start()
    with pytest.raises(RewardError, match="ModuleNotFoundError"):
        Child("no_such_module:make", {}).start()
    with pytest.raises(ConfigError, match="is unknown"):
        Child("rlhf_ray.rewards.calling:serve", {"function": "zzz", "adapter": "auto", "args": {}}).start()


def test_it_ends_when_nobody_holds_it(child):
    child.call(1, 30)
    other = Child("child_targets:make", {})
    pid = other.call("pid", 30)
    del other
    assert gone(pid)


def test_it_ends_with_a_parent_that_is_killed_in_the_middle_of_a_call(child, tmp_path):
    code = textwrap.dedent("""
        import sys, threading, time, os, signal
        from rlhf_ray.rewards.process import Child
        child = Child("child_targets:make", {})
        print(child.call("pid", 30), flush=True)
        threading.Thread(target=child.call, args=("grandchild", 600), daemon=True).start()
        while not os.path.exists(os.environ["PID_FILE"]) or not open(os.environ["PID_FILE"]).read():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert gone(int(done.stdout.split()[0]))
    assert gone(int((tmp_path / "pid").read_text())), "and what the function has started"


def test_ctrl_c_does_not_wait_for_a_function_that_hangs(tmp_path):
    slow = "import time\ndef f(completions):\n    print('called', flush=True)\n    time.sleep(600)\n"
    (tmp_path / "slow.py").write_text(slow)
    code = textwrap.dedent(f"""
        from rlhf_ray.rewards.compose import RewardSet, load_reward
        reward = load_reward({str(tmp_path / "slow.py") + ":f"!r}, isolated=True)
        RewardSet([reward]).score(["p"], ["c"], [[1]], [{{}}])
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    try:
        assert process.stdout.readline() == "called\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode != 0 and "KeyboardInterrupt" in said
    finally:
        process.kill()
        process.communicate()
