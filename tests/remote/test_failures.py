"""Errors on their way from a worker to the driver."""

from __future__ import annotations

import datetime
import errno
import pickle
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray import exceptions as of_ray
from torch import distributed

from rlhf_ray import errors
from rlhf_ray.config.sections import RayConfig
from rlhf_ray.errors import (
    DataError,
    EngineError,
    ForeignError,
    RanksLostError,
    RlhfRayError,
    SyncError,
    WorkerError,
)
from rlhf_ray.remote import calls, crew
from rlhf_ray.remote.calls import Call, Deadline, Worker, death
from rlhf_ray.remote.failures import LostError, is_infrastructure, portable, reported
from rlhf_ray.remote.health import Limits
from rlhf_ray.remote.supervisor import Setback

OWN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RlhfRayError)]


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind is not EngineError], ids=lambda kind: kind.__name__)
def test_own_errors_keep_type_and_text(kind):
    sent = portable(kind("what, why, what to do"), "reward: score")
    arrived = pickle.loads(pickle.dumps(sent))
    assert type(arrived) is kind and str(arrived) == "what, why, what to do"


def test_a_dead_engine_is_a_lost_worker():
    """Its process lives, and can do nothing any more: another one may take the seat."""
    sent = portable(EngineError("vllm generator: its engine died of RuntimeError: CUDA error"), "generator 1: write")
    arrived = pickle.loads(pickle.dumps(sent))
    assert isinstance(arrived, LostError)
    assert str(arrived).startswith("generator 1: write failed: EngineError: vllm generator: its engine died of Runtime")


class Lender:
    name = "learner rank 1"

    @reported
    def update(self, error):
        raise error

    @reported
    def fine(self, a, b=2):
        return a + b


def test_foreign_errors_are_quoted_with_their_traceback():
    with pytest.raises(ForeignError) as caught:
        Lender().update(ZeroDivisionError("1/0"))
    text = str(pickle.loads(pickle.dumps(caught.value)))
    assert text.startswith("learner rank 1: update failed: ZeroDivisionError: 1/0\n")
    assert "in update\n    raise error" in text
    assert isinstance(caught.value, WorkerError) and isinstance(caught.value, RuntimeError)


class Unpicklable(DataError):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class TwoArguments(DataError):
    """Pickles, and fails to unpickle: exceptions are rebuilt from `args` alone."""

    def __init__(self, file, line):
        super().__init__(f"{file}:{line}")


@pytest.mark.parametrize("error", [Unpicklable("x"), TwoArguments("a.jsonl", 3)], ids=lambda e: type(e).__name__)
def test_own_errors_that_cannot_travel_are_quoted_too(error):
    sent = portable(error, "reward: score")
    assert type(sent) is ForeignError and f"{type(error).__name__}: {error}" in str(sent)


def test_results_pass():
    assert Lender().fine(1) == 3 and Lender().fine(1, b=5) == 6


def test_a_death_is_told_in_one_sentence():
    told = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: LearnerHost\n\tpid: 7\n"
        "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. "
        "End of file. Some common causes include: (1) the process was killed by the OOM killer"
    )
    error = death(Worker("learner rank 1", None, "10.0.0.3", 7), RuntimeError(told), "during update")
    assert str(error) == (
        "learner rank 1 (node 10.0.0.3, pid 7) died during update: Worker unexpectedly exits with a connection error "
        "code 2. End of file; look for a signal or the out-of-memory killer on that node, then resume with "
        "--resume auto"
    )


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def times_out() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(0.01)
        listener.listen()
        listener.accept()


def meets_nobody() -> None:
    distributed.TCPStore("127.0.0.1", closed_port(), is_master=False, timeout=datetime.timedelta(milliseconds=1))


def raises(error: BaseException, cause: BaseException | None = None) -> None:
    raise error from cause


# What libraries raise here and now, and what it takes a GPU, a second machine or bad luck to see.
INFRASTRUCTURE = {
    "no memory, Python": lambda: bytearray(1 << 62),
    "no memory, torch": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "nobody listens": lambda: socket.create_connection(("127.0.0.1", closed_port())),
    "a socket's timeout": times_out,
    "no meeting point": meets_nobody,
    "no route": lambda: raises(OSError(errno.EHOSTUNREACH, "No route to host")),
    "a broken disk": lambda: raises(OSError(errno.EIO, "Input/output error")),
    "gloo": lambda: raises(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711")),
    "nccl": lambda: raises(distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process")),
    "ecc": lambda: raises(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214)),
    "cuda, as older code has it": lambda: raises(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "an actor died": lambda: raises(of_ray.ActorDiedError()),
    "an actor is out of reach": lambda: raises(of_ray.ActorUnavailableError("cut", None)),
    "a machine died": lambda: raises(of_ray.NodeDiedError("gone")),
    "a result was lost": lambda: raises(of_ray.ObjectLostError("ab" * 14, None, "")),
    "Ray's memory monitor": lambda: raises(of_ray.OutOfMemoryError("the node was running low on memory")),
    "behind another one": lambda: raises(ValueError("no answer"), ConnectionResetError(errno.ECONNRESET, "reset")),
}
WORK = {
    "shapes": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "a token beyond the table": lambda: torch.nn.functional.embedding(torch.tensor([9]), torch.ones(2, 2)),
    "a row without a column": lambda: {}["answer"],
    "no file": lambda: Path("/nowhere/rows.jsonl").read_text(),
    "a full disk": lambda: raises(OSError(errno.ENOSPC, "No space left on device")),
    "a batch too large for the GPU": lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
    "an index on the GPU": lambda: raises(torch.AcceleratorError("CUDA error: device-side assert triggered", 710)),
    "a text that names an error": lambda: raises(ValueError("row 3: 'NCCL error' is no number")),
}


@pytest.mark.parametrize("name", INFRASTRUCTURE)
def test_infrastructure_is_told_from_work(name):
    with pytest.raises(Exception) as caught:
        INFRASTRUCTURE[name]()
    assert is_infrastructure(caught.value), repr(caught.value)
    assert type(portable(caught.value, "reference: logprobs")) is LostError


@pytest.mark.parametrize("name", WORK)
def test_work_that_fails_fails_everywhere(name):
    with pytest.raises(Exception) as caught:
        WORK[name]()
    assert not is_infrastructure(caught.value), repr(caught.value)
    assert type(portable(caught.value, "reward: score")) is ForeignError


def test_a_lost_process_says_where_to_look():
    sent = pickle.loads(pickle.dumps(portable(MemoryError("4 GiB"), "reward: score")))
    first, _, rest = str(sent).partition("\n")
    assert first == (
        "reward: score failed: MemoryError: 4 GiB; its process, machine or network failed, not the work: look there "
        "(memory, devices, the kernel's log), then resume with --resume auto"
    )
    assert rest.startswith("--- traceback of the worker ---\n") and type(sent) is LostError


def test_nothing_is_asked_of_a_ray_that_is_over(monkeypatch):
    """Ray would start anew, from a thread that the end of the run has left behind."""
    call = Call(Worker("reward", None), "score", lambda actor: "ref", Deadline(60, "ray.call_deadline_s"))
    monkeypatch.setattr(calls.ray, "is_initialized", lambda: False)
    for name in ("get", "wait"):
        monkeypatch.setattr(calls.ray, name, lambda *args, **kwargs: pytest.fail("Ray was asked"))
    for ask in (lambda: calls.value_of(call), lambda: calls.next_done([call], lambda calls: None)):
        with pytest.raises(WorkerError, match="the run is over"):
            ask()


@pytest.mark.parametrize("kind", [SyncError, ForeignError, WorkerError])
def test_what_a_rank_says_of_the_death_of_another_sends_the_run_back(monkeypatch, kind):
    """Whatever words it has for it: rank 1 has died, and rank 0's call ends first."""
    monkeypatch.setattr(crew, "CAUSE_S", 0.2)
    team = crew.Crew(Limits.of(RayConfig()))
    seats = SimpleNamespace(lost=None, setback=None)
    team.supervisor, team._watcher = seats, threading.current_thread()

    def ends_first(*_):
        if seats.dies:
            threading.Timer(0.05, lambda: setattr(seats, "setback", seats.dies)).start()
        raise kind("weight sync: gather failed")

    monkeypatch.setattr(crew, "first_result", ends_first)
    seats.dies = None
    with pytest.raises(kind, match="gather failed"):
        team.next_done([])
    seats.dies = Setback("learner rank 1", "learner rank 1 died: killed", 0.1, 0.0)
    with pytest.raises(RanksLostError, match="rank 1 died"):
        team.next_done([])


def test_time_in_which_the_waiting_process_was_stopped_is_nobodys_delay(monkeypatch):
    """A scheduler stops all of a job for ten minutes; the call has a minute, and needs 50 s of it."""
    now = [0.0]

    def wait(refs, num_returns, timeout):
        now[0] += 600 if now[0] == 10 else timeout
        return (refs if now[0] >= 650 and ends else []), []

    monkeypatch.setattr(calls.ray, "wait", wait)
    monkeypatch.setattr(calls, "_require_ray", lambda: None)
    monkeypatch.setattr(calls.time, "monotonic", lambda: now[0])
    for ends, at in ((True, 650), (False, 659.5)):
        now[0] = 0.0
        call = Call(Worker("reward", None), "score", lambda actor: object(), Deadline(60, "ray.call_deadline_s"))
        assert calls.next_done([call], check=lambda under_way: None) is call
        assert (call.late, now[0]) == (not ends, at)
