"""Errors on their way from a worker to the driver."""

from __future__ import annotations

import pickle
import threading

import pytest

from rlhf_ray import errors
from rlhf_ray.errors import DataError, RlhfRayError, WorkerError
from rlhf_ray.remote.calls import Worker, death
from rlhf_ray.remote.failures import ForeignError, portable, reported

OWN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RlhfRayError)]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_own_errors_keep_type_and_text(kind):
    sent = portable(kind("what, why, what to do"), "reward: score")
    arrived = pickle.loads(pickle.dumps(sent))
    assert type(arrived) is kind and str(arrived) == "what, why, what to do"


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
