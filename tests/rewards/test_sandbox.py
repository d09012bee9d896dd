"""The sandbox against programs that mean harm, in every tier that works here. The host must not notice."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import sandbox, sandbox_inner
from rlhf_ray.rewards.sandbox import Limits, run_python

# In one process: they count what runs and lies about on the whole machine.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sandbox")]

SHORT = Limits(seconds=1.0, memory_mb=128)


def test_a_program_to_its_end(tier):
    ran = run_python("name = input()\nprint('hello', name)", stdin="you\n", tier=tier)
    assert ran.finished and ran.stdout == "hello you\n" and ran.why == ""
    leaves = run_python("import sys; print(1); sys.exit(0); print(2)", tier=tier)
    assert leaves.finished and leaves.stdout == "1\n"
    assert run_python("if __name__ == '__main__': print(__name__)", tier=tier).stdout == "__main__\n"


def test_a_program_ends_as_it_would_by_itself(tier):
    """Threads that nobody waited for are waited for, and exit handlers run: both may print the answer."""
    program = """
import atexit, threading, time
atexit.register(print, "last")
def main():
    time.sleep(0.1)
    print("answer")
threading.Thread(target=main).start()
"""
    ran = run_python(program, tier=tier)
    assert ran.finished and ran.stdout == "answer\nlast\n"


def test_what_ordinary_programs_need(tier):
    program = """
import collections, json, math, re, subprocess, sys, tempfile, threading
threads = [threading.Thread(target=print, args=(i,)) for i in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
with open("notes.txt", "w") as file: file.write("kept")
with tempfile.TemporaryFile() as file: file.write(b"x")
print(open("notes.txt").read(), subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True).stdout)
"""
    ran = run_python(program, tier=tier)
    assert ran.finished, ran.why
    assert sorted(ran.stdout.split()) == ["0", "1", "2", "b'7\\n'", "kept"]


@pytest.mark.parametrize("tier", ["landlock"], indirect=True)  # the limits are the same in both
@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "exit status 0|ended early"),
        ("assert False, 'no'", "AssertionError: no"),
        ("def broken(:", "SyntaxError"),
        ("import os; os._exit(3)", "ended early, with exit status 3"),
        ("import os, signal; os.abort()", "ended early, with exit status -6|PermissionError|ended early"),
        ("import ctypes; ctypes.string_at(0)", "ended early"),
        ("while True: pass", "did not end within 1 s"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append('x' * 1000000)", "MemoryError"),
        ("open('big', 'wb').write(b'x' * (1 << 24))", "OSError|ended early"),
        ("files = [open('f%d' % i, 'w') for i in range(1000)]", "OSError: .*Too many open files"),
        ("while True: print('x' * 10000)", "wrote more than 256 kB"),
    ],
)
def test_programs_that_fail(tier, program, why):
    ran = run_python(program, limits=SHORT, tier=tier)
    assert not ran.finished
    assert re.search(why, ran.why), ran.why


def test_fork_bomb(tier):
    """It may fail or hang, but nothing of it is left, and it never had more than its few processes."""
    most, done = 0, threading.Event()
    before = processes()

    def watch():
        nonlocal most
        while not done.wait(0.05):
            most = max(most, processes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    ran = run_python(bomb, limits=SHORT, tier=tier)
    done.set()
    watcher.join()
    assert not ran.finished and ran.why == "did not end within 1 s"
    assert most < 60, f"{most} processes at once"
    assert no_sample_runs()


def test_a_child_that_leaves_the_session_does_not_outlive_the_test(tier):
    leaves = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
    ran = run_python(leaves, limits=SHORT, tier=tier)
    assert ran.finished
    assert no_sample_runs()


def test_files_of_the_host_can_neither_be_deleted_nor_written(tier, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    os.chmod(tmp_path, 0o777)
    os.chmod(victim, 0o666)
    for harm in (
        f"import os; os.remove({str(victim)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"open({str(victim)!r}, 'w')",
        f"open({str(tmp_path / 'new.txt')!r}, 'x')",
        f"import shutil; shutil.rmtree({os.path.dirname(os.__file__)!r})",
    ):
        assert not run_python(harm, limits=SHORT, tier=tier).finished, harm
    assert victim.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["victim.txt"]
    assert Path(os.__file__).is_file()


def test_secrets_of_the_host_cannot_be_read(tier, tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret-in-the-environment")
    secret = tmp_path / "token"
    secret.write_text("secret-in-a-file")
    program = f"""
import glob, os
for path in [{str(secret)!r}, "/etc/shadow", "/root/.ssh/id_rsa", *glob.glob("/proc/[0-9]*/environ")]:
    try: print(open(path).read())
    except OSError: pass
print(dict(os.environ))
"""
    ran = run_python(program, tier=tier)
    assert ran.finished and "secret" not in ran.stdout, ran.stdout
    assert not run_python("import os; os.environ['API_TOKEN']", tier=tier).finished


def test_no_network(tier):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not run_python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", tier=tier).finished
    for kind in ("AF_INET, socket.SOCK_DGRAM", "AF_INET6", "AF_UNIX"):
        assert not run_python(f"import socket; socket.socket(socket.{kind})", tier=tier).finished, kind


def test_other_processes_cannot_be_signalled(tier):
    for harm in (f"os.kill({os.getpid()}, 0)", "os.kill(os.getppid(), 9)", "os.kill(-1, 9)"):
        assert not run_python(f"import os; {harm}", limits=SHORT, tier=tier).finished, harm


def test_the_host_is_itself_afterwards(tier):
    """No zombie, no open file, no temporary folder stays behind."""
    files, folders = len(os.listdir("/proc/self/fd")), sample_folders()
    for program in ("print(1)", "import os; os._exit(1)", "x"):
        run_python(program, tier=tier)
    assert len(os.listdir("/proc/self/fd")) == files
    assert sample_folders() == folders


def test_which_tier(monkeypatch):
    sandbox.sandbox_tier.cache_clear()
    works = {"bubblewrap": False, "landlock": True, "limits": True}
    monkeypatch.setattr(sandbox, "why_not", lambda tier: None)
    monkeypatch.setattr(sandbox, "_trial", lambda tier: None if works[tier] else "does not start")
    assert sandbox.sandbox_tier() == "landlock"
    sandbox.sandbox_tier.cache_clear()
    works.update(landlock=False, limits=False)
    with pytest.raises(ConfigError, match="no sandbox here .*bubblewrap: does not start; .*install bubblewrap"):
        sandbox.sandbox_tier()
    sandbox.sandbox_tier.cache_clear()


def test_root_is_never_left_with_resource_limits_alone(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "as root" in sandbox.why_not("limits")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sandbox.why_not("limits") is None


def test_without_a_kernel_that_has_it(monkeypatch):
    monkeypatch.setattr(sandbox_inner, "landlock_version", lambda: 0)
    assert sandbox.why_not("landlock") == "the kernel has no Landlock"
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert sandbox.why_not("bubblewrap") == "bwrap is not on the PATH"


def test_a_program_ends_with_whoever_waits_for_it(tier, repo_root):
    """Nobody is there any more to end it when its time is over."""
    code = textwrap.dedent(f"""
        import os, psutil, signal
        from rlhf_ray.rewards import sandbox
        def passed(stdout, *_):
            if b"up" in stdout:
                print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        sandbox._limit_passed = passed
        program = "import time; print('up', flush=True); time.sleep(600)"
        sandbox.run_python(program, tier={tier!r}, limits=sandbox.Limits(seconds=600))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(repo_root)})  # fmt: skip
    assert done.returncode == -9 and done.stdout.split(), done.stderr
    started = [psutil.Process(int(pid)) for pid in done.stdout.split() if psutil.pid_exists(int(pid))]
    psutil.wait_procs(started)  # the test's time limit ends it


@pytest.mark.skipif(os.geteuid() == 0, reason="root is refused this tier")
def test_limits_alone_still_end_a_loop():
    assert run_python("while True: pass", limits=SHORT, tier="limits").why == "did not end within 1 s"


def sample_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("rlhf_ray_sample_*"))


def processes() -> int:
    return sum(name.isdecimal() for name in os.listdir("/proc"))


def no_sample_runs() -> bool:
    """Zombies of a process namespace may take the kernel a moment."""
    while any(_is_sample(pid) for pid in os.listdir("/proc") if pid.isdecimal()):  # the test's time limit ends it
        time.sleep(0.05)
    return True


def _is_sample(pid: str) -> bool:
    try:
        return b'"job_fd"' in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
