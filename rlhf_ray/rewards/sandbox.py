"""Runs a program that nobody has read: limits on time, memory, processes and files; no network, no secrets.

Three tiers, the first that works here (`sandbox_tier`); docs/rewards.md says what each one keeps out. `bubblewrap`
(`bwrap` on the PATH) is a security boundary: the program sees another file system, other processes, no network.
`landlock` bounds what it may open, call and signal, in this machine's own view of processes. `limits` is no boundary:
resource limits and an empty environment only.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import sandbox_inner
from rlhf_ray.rewards.sandbox_sweep import Watch, tasks_of

TIERS = ("bubblewrap", "landlock", "limits")

_SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")
_STDERR_KEPT = 2000


@dataclass(frozen=True)
class Limits:
    """Of one program. `seconds` are real time; CPU time may be as much, and a second more."""

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 8
    open_files: int = 64
    output_kb: int = 256
    reply_mb: int = 16  # of one answer of a process that answers questions


@dataclass(frozen=True)
class Ran:
    """`finished`: it came to its end with exit status 0. `why`: what happened otherwise."""

    finished: bool
    stdout: str
    why: str = ""


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen
    watch: Watch


def run_python(program: str, *, stdin: str = "", limits: Limits = Limits(), tier: str | None = None) -> Ran:
    """Run `program` to its end, or to that of its limits. Never raises for what the program does.

    Raises:
        ConfigError: this machine has no sandbox to offer.
    """
    with tempfile.TemporaryFile() as given:
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        job = {"program": program, "pipes": []}
        with started(job, limits=limits, tier=tier, stdin=given.fileno(), stdout=subprocess.PIPE) as running:
            return _follow(running.process, limits, running.watch)


@contextmanager
def started(
    job: Mapping[str, Any],
    *,
    limits: Limits,
    tier: str | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    seconds: float | None = None,
) -> Iterator[Started]:
    """A process in the sandbox that does `job` (see `sandbox_inner.main`); nothing of it runs afterwards.

    Args:
        job: `pipes` are those of this process's file descriptors that it gets, under the same numbers.
        seconds: of CPU time; default: the limit for one program.
    """
    tier = tier or sandbox_tier()
    marker = secrets.token_hex(16)
    limits = limits if seconds is None else replace(limits, seconds=seconds)
    with _work_folder() as folder, tempfile.TemporaryFile() as file:
        file.write(json.dumps(job).encode())
        file.seek(0)
        uid = _unused_uid() if os.geteuid() == 0 else None
        if uid is not None:
            os.chown(folder, uid, uid)
        process = subprocess.Popen(
            _command(tier, _settings(tier, limits, uid, file.fileno())), cwd=folder, env=_environment(folder, marker),
            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, pass_fds=[file.fileno(), *job["pipes"]],
            start_new_session=True,
        )  # fmt: skip
        own_pids = tier != "bubblewrap"
        with Watch(process, limits.processes, uid=uid, marker=marker, own_pids=own_pids) as watch:
            yield Started(process, watch)


@functools.lru_cache(maxsize=1)
def sandbox_tier() -> str:
    """The strongest tier that works on this machine, tried with a program that does nothing.

    Raises:
        ConfigError: none does; says why.
    """
    reasons = []
    for tier in TIERS:
        reason = why_not(tier) or _trial(tier)
        if reason is None:
            return tier
        reasons.append(f"{tier}: {reason}")
    raise ConfigError("there is no sandbox here to run code in (" + "; ".join(reasons) + "); install bubblewrap")


def why_not(tier: str) -> str | None:
    """What a tier lacks here; None if it may be tried."""
    if tier == "bubblewrap":
        return None if shutil.which("bwrap") else "bwrap is not on the PATH"
    if tier == "landlock":
        if not sandbox_inner.landlock_version():
            return "the kernel has no Landlock"
        return None if sandbox_inner.seccomp_known() else f"no seccomp filter is written for {platform.machine()}"
    return "as root, nothing would keep a program from deleting files" if os.geteuid() == 0 else None


def _trial(tier: str) -> str | None:
    ran = run_python("import json, unittest", tier=tier, limits=Limits(seconds=20))
    return None if ran.finished else ran.why


# ---- starting -------------------------------------------------------------------------------------------------


def _settings(tier: str, limits: Limits, uid: int | None, job: int) -> dict[str, Any]:
    # Processes are counted for each user: of one that others use too, theirs come on top.
    others = 0 if uid is not None or tier == "bubblewrap" else tasks_of(os.geteuid())
    seconds = int(limits.seconds) + 1
    return {
        "job_fd": job, "uid": uid, "readable": [*_readable(), *_DEVICES], "landlock": tier == "landlock",
        "seccomp": sandbox_inner.seccomp_known(),
        "limits": {
            "RLIMIT_CPU": seconds, "RLIMIT_AS": limits.memory_mb << 20, "RLIMIT_FSIZE": limits.file_mb << 20,
            "RLIMIT_NOFILE": limits.open_files, "RLIMIT_NPROC": limits.processes + others, "RLIMIT_CORE": 0,
        },
    }  # fmt: skip


def _command(tier: str, settings: dict[str, Any]) -> list[str]:
    inner = Path(sandbox_inner.__file__).read_text(encoding="utf-8")
    python = [sys.executable, "-I", "-c", inner, json.dumps(settings)]
    return [*_bubblewrap(settings["limits"]["RLIMIT_FSIZE"]), *python] if tier == "bubblewrap" else python


def _bubblewrap(disk: int) -> list[str]:
    """Everything unshared; of the file system only what Python needs, read-only; an own /tmp in memory."""
    command = [shutil.which("bwrap"), "--die-with-parent", "--new-session"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        # Just enough to become somebody else inside: limits on processes do not hold for root.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    # Before what lies in it: an environment under /tmp stays in sight.
    command += ["--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]
    made = {"/tmp"}
    for path in _readable():
        for parent in reversed(Path(path).parents):
            # Made by us and open to all: bwrap would make /root as private as it is outside.
            if str(parent) not in ("/", *made):
                command += ["--perms", "0755", "--dir", str(parent)]
                made.add(str(parent))
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev"]
    return [*command, "--chdir", "/tmp", "--setenv", "HOME", "/tmp", "--setenv", "TMPDIR", "/tmp"]


def _readable() -> list[str]:
    """What a Python program reads: the system's libraries, the interpreter and its packages."""
    paths = [path for path in _SYSTEM_PATHS if os.path.exists(path)]
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        if not any(prefix == path or prefix.startswith(f"{path}/") for path in paths):
            paths.append(prefix)
    return paths


def _environment(folder: str, marker: str) -> dict[str, str]:
    """Nothing is inherited: no secrets, no proxies. The marker lets us find what the program left running, and says
    nothing about what it achieved."""
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1", "RLHF_RAY_SANDBOX": marker}  # fmt: skip


def _unused_uid() -> int:
    """A user of its own for each program, so that its processes are counted, and ended, apart from all others."""
    return 1_000_000_000 + secrets.randbelow(1_000_000_000)


@contextmanager
def _work_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="rlhf_ray_sample_")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- following ------------------------------------------------------------------------------------------------


def _follow(process: subprocess.Popen, limits: Limits, watch: Watch) -> Ran:
    deadline = time.monotonic() + limits.seconds
    read = {process.stdout: bytearray(), process.stderr: bytearray()}
    why = ""
    with selectors.DefaultSelector() as selector:
        for source in read:
            selector.register(source, selectors.EVENT_READ)
        while not why:
            running = process.poll() is None
            ready = selector.select(0.05 if running else 0)
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                read[key.fileobj] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
            if not running and not ready:
                break  # what it left running may hold the pipes open
            why = _limit_passed(read[process.stdout], read[process.stderr], deadline, limits, watch)
    stdout = bytes(read[process.stdout]).decode("utf-8", "replace")
    if not why and process.returncode == 0:
        return Ran(True, stdout)
    said = bytes(read[process.stderr][-_STDERR_KEPT:]).decode("utf-8", "replace").strip()
    return Ran(False, stdout, why or said or f"ended early, with exit status {process.returncode}")


def _limit_passed(stdout: Sequence[int], stderr: Sequence[int], deadline: float, limits: Limits, watch: Watch) -> str:
    if time.monotonic() > deadline:
        return f"did not end within {limits.seconds:g} s"
    if len(stdout) + len(stderr) > limits.output_kb * 1000:
        return f"wrote more than {limits.output_kb} kB"
    return "started too many processes" if watch.too_many() else ""
