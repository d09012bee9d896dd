"""Strikes processes of a run from within, for `python -m benchmarks.chaos`: at a named phase of the run, in a call.

Python imports a module of this name when it starts, so with this folder on PYTHONPATH every process of a run has it,
Ray's workers too, and the product knows nothing of it. $CHAOS_OUT is a folder:

    plan.json      the strikes: {"id", "victim", "phase", "step", "signal", "after_ms", "call"}
    phase.json     what the run is doing now, as its driver says
    phases.jsonl   when each phase began, and ended or was broken off by an error
    strikes.jsonl  a victim's last words, written before the signal: who, pid, phase, step, call, when
    struck/ID      whose strike has been taken; each happens once, whatever is started again

A victim that has work in the phase is struck within the call that does it, `after_ms` after it began: the call does not
return before. One that has none is struck while it waits. The phase does not end before. So no clock decides whether a
strike falls into its phase.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OUT = os.environ.get("CHAOS_OUT", "")

# What the loop's timer calls the parts of a step (rlhf_ray/loops/rl.py)
PHASES = {
    "generate": "generating", "reward": "scoring", "ref_logp": "scoring", "values": "scoring", "old_logp": "scoring",
    "update": "updating", "critic_update": "updating", "weight_sync": "syncing", "ckpt": "checkpointing",
}  # fmt: skip
# (role, phase) -> the calls that are its work there
WORK = {
    ("generator", "generating"): ("write",),
    ("generator", "syncing"): ("start_weight_update", "update_weights", "finish_weight_update", "logprobs"),
    ("reference", "scoring"): ("logprobs",),
    ("reward", "scoring"): ("score",),
    ("critic", "scoring"): ("values",),
    ("critic", "updating"): ("learn",),
    ("critic", "checkpointing"): ("save",),
    ("learner", "scoring"): ("logprobs",),
    ("learner", "updating"): ("learn",),
    ("learner", "syncing"): ("push_weights",),
    ("learner", "checkpointing"): ("save",),
}  # fmt: skip
# Calls that every host answers beside its role's
NO_WORK = frozenset({"place", "pulse", "use_gpus", "release_port", "release_memory", "build", "serve", "shut_down"})
LONGEST_DELAY_MS = float(os.environ.get("CHAOS_DELAY_MS", "0"))
LOOK_S = 0.01
# How long a phase, or a call, is kept open for a victim that is just being started again.
HOLD_S = 20.0

seat = ""  # this process's name in the run
rounds = 0  # of the training loop in this process; a step that has begun counts
delays = random.Random()
doing: dict[str, int] = {}  # the driver's: phases that are under way
driver_lock = threading.RLock()


# ---- the plan ---------------------------------------------------------------------------------------------------


def read(name: str) -> Any:
    """A file of $CHAOS_OUT that is only ever replaced as a whole; None while there is none."""
    try:
        with open(f"{OUT}/{name}", encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def append(name: str, row: dict[str, Any]) -> None:
    descriptor = os.open(f"{OUT}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, (json.dumps(row) + "\n").encode())  # one write: other processes append, too
    os.fsync(descriptor)
    os.close(descriptor)


def is_struck(strike: dict[str, Any]) -> bool:
    return os.path.exists(f"{OUT}/struck/{strike['id']}")


def has_fallen(strike: dict[str, Any]) -> bool:
    """Whether the victim is dead or stopped by now."""
    try:
        with open(f"{OUT}/struck/{strike['id']}", encoding="utf-8") as file:
            pid = file.read()
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return bool(pid) and file.read().rpartition(") ")[2][0] in "TZX"
    except FileNotFoundError:
        return is_struck(strike)


def is_victim(strike: dict[str, Any], name: str) -> bool:
    """`generator` is whichever generator comes first, `learner rank 1` that one alone."""
    return name == strike["victim"] or name.startswith(f"{strike['victim']} ")


def waiting(name: str) -> list[dict[str, Any]]:
    """Strikes of this seat that nobody has taken yet."""
    return [s for s in read("plan.json") or [] if is_victim(s, name) and not is_struck(s)]


def is_due(strike: dict[str, Any], now: dict[str, Any] | None) -> bool:
    return now is not None and strike["phase"] in now["phases"] and strike["step"] <= now["step"]


def strike_now(strike: dict[str, Any], call: str, began: float) -> None:
    """The last words, then the signal. Returns only where another process was faster, or after SIGCONT."""
    now = read("phase.json") or {}
    try:
        with open(f"{OUT}/struck/{strike['id']}", "x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    words = {
        "id": strike["id"], "seat": seat, "pid": os.getpid(), "signal": strike["signal"], "phase": strike["phase"],
        "step": now.get("step"), "doing": now.get("phases"), "call": call,
        "after_ms": round(1000 * (time.monotonic() - began), 1), "time": time.time(),
    }  # fmt: skip
    append("strikes.jsonl", words)
    os.kill(os.getpid(), getattr(signal, strike["signal"]))


# ---- workers ----------------------------------------------------------------------------------------------------


def hook_host(module: Any) -> None:
    """A worker learns who it is, and watches for strikes in phases in which it has nothing to do."""
    make = module.Host.__init__

    @functools.wraps(make)
    def made(self: Any, name: str, *rest: Any) -> None:
        global seat
        make(self, name, *rest)
        seat = name
        delays.seed(f"{os.environ.get('CHAOS_SEED')} {name}")
        if waiting(name):
            threading.Thread(target=watch_idle, name="striker", daemon=True).start()

    module.Host.__init__ = made


def watch_idle() -> None:
    role = seat.split()[0]
    while left := waiting(seat):
        now = read("phase.json")
        for strike in left:
            if (role, strike["phase"]) not in WORK and is_due(strike, now):
                began = time.monotonic()
                time.sleep(strike["after_ms"] / 1000)
                strike_now(strike, "idle", began)
        time.sleep(LOOK_S)


def hook_hosts(module: Any) -> None:
    """Each call of a role that is its work in a phase may be the last."""
    for kind in [kind for kind in vars(module).values() if isinstance(kind, type) and hasattr(kind, "pulse")]:
        for name, method in list(vars(kind).items()):
            if callable(method) and not name.startswith("_") and name not in NO_WORK and isinstance(method, FUNCTION):
                setattr(kind, name, struck_within(method))


FUNCTION = type(read)


def struck_within(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        name = str(args[0]) if method.__name__ in ("ask", "compute") else method.__name__
        delayed()
        strike = strike_in(name)
        if strike is None:
            return method(self, *args, **named)
        began, over = time.monotonic(), threading.Event()

        def wait_and_strike() -> None:
            time.sleep(strike["after_ms"] / 1000)
            strike_now(strike, name, began)
            over.set()

        threading.Thread(target=wait_and_strike, name="striker", daemon=True).start()
        result = method(self, *args, **named)
        over.wait(HOLD_S)
        return result

    return call


def strike_in(call: str) -> dict[str, Any] | None:
    """The strike that is due in this call of this worker."""
    role = seat.split()[0]
    for strike in waiting(seat):
        work = WORK.get((role, strike["phase"]), ())
        wanted = strike.get("call") or work[:1]
        if call in work and call in wanted and is_due(strike, read("phase.json")):
            return strike
    return None


def delayed() -> None:
    """For the hunt after dead-locks: a call may begin later than it does, by chance; most of them hardly do."""
    if LONGEST_DELAY_MS:
        time.sleep(LONGEST_DELAY_MS / 1000 * delays.random() ** 4)


# ---- the driver -------------------------------------------------------------------------------------------------


def hook_timer(module: Any) -> None:
    """What the loop measures is what the run is doing."""
    measure = module.Timer.__call__

    @contextmanager
    def measured(self: Any, name: str) -> Iterator[None]:
        phase = PHASES.get(name)
        with measure(self, name):
            if phase is None or not rounds:
                yield
                return
            enter(phase)
            ended = "broken off"
            try:
                yield
                hold(phase)
                ended = "end"
            finally:
                leave(phase, ended)

    module.Timer.__call__ = measured


def hook_training_run(module: Any) -> None:
    steps = module.TrainingRun.steps

    @functools.wraps(steps)
    def noted(self: Any, *args: Any) -> Iterator[int]:
        global seat, rounds
        seat = "driver"
        inner = steps(self, *args)
        try:
            for step in inner:
                rounds = step + 1
                say("loop", "step")
                yield step
        finally:
            inner.close()

    module.TrainingRun.steps = noted


def say(phase: str, what: str) -> None:
    """To everybody: what the run is doing from now on."""
    with driver_lock:
        now = {"step": rounds, "phases": [phase for phase, count in doing.items() if count], "pid": os.getpid()}
        with open(f"{OUT}/phase.tmp", "w", encoding="utf-8") as file:
            json.dump(now, file)
        os.replace(f"{OUT}/phase.tmp", f"{OUT}/phase.json")
        append("phases.jsonl", {"time": time.time(), "step": rounds, "phase": phase, "what": what, "pid": os.getpid()})


def enter(phase: str) -> None:
    with driver_lock:
        doing[phase] = doing.get(phase, 0) + 1
        say(phase, "begin")
    for strike in waiting("driver"):
        if strike["phase"] == phase and strike["step"] <= rounds:
            began = time.monotonic()

            def wait_and_strike(strike: dict[str, Any] = strike, began: float = began) -> None:
                time.sleep(strike["after_ms"] / 1000)
                strike_now(strike, phase, began)

            threading.Thread(target=wait_and_strike, name="striker", daemon=True).start()


def hold(phase: str) -> None:
    """The phase is not over before its strikes have fallen."""
    until = time.monotonic() + HOLD_S
    mine = [s for s in read("plan.json") or [] if s["phase"] == phase and s["step"] <= rounds]
    while any(not has_fallen(strike) for strike in mine) and time.monotonic() < until:
        time.sleep(LOOK_S)


def leave(phase: str, how: str) -> None:
    with driver_lock:
        doing[phase] -= 1
        say(phase, how)


def hook_restart(module: Any) -> None:
    module.PAUSE_S = float(os.environ.get("CHAOS_PAUSE_S", module.PAUSE_S))


def hook_health(module: Any) -> None:
    module.BACK_OFF_S = float(os.environ.get("CHAOS_BACK_OFF_S", module.BACK_OFF_S))


# ---- when a module is imported ------------------------------------------------------------------------------------


class Hooks(importlib.abc.MetaPathFinder):
    """Calls a hook with a module once it has been imported."""

    waiting = {
        "rlhf_ray.remote.host": hook_host, "rlhf_ray.remote.hosts": hook_hosts, "rlhf_ray.run.timer": hook_timer,
        "rlhf_ray.run.training_run": hook_training_run, "rlhf_ray.commands.restart": hook_restart,
        "rlhf_ray.remote.health": hook_health,
    }  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        hook = self.waiting.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if hook else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_hook(module: Any) -> None:
            run(module)
            hook(module)

        spec.loader.exec_module = run_and_hook
        return spec


if OUT:
    sys.meta_path.insert(0, Hooks())
