"""The columns that several roles compute at once, where they can."""

import threading
from types import SimpleNamespace

import pytest

from rlhf_ray.errors import WorkerError
from rlhf_ray.loops.rl import add_columns
from rlhf_ray.run.timer import Timer


def test_the_first_failure_is_not_kept_waiting_by_a_role_that_hangs():
    """Nor is Ctrl-C: what others compute ends with the workers, which end after this."""
    begun, go_on, hanging = threading.Event(), threading.Event(), []

    def fail(batch):
        assert begun.wait(20)
        raise WorkerError("the reference died")

    def hang(batch):
        hanging.append(threading.current_thread())
        begun.set()
        assert go_on.wait(20), "it was waited for"

    roles = SimpleNamespace(
        parallel=True, reference=SimpleNamespace(logprobs=fail), critic=SimpleNamespace(values=hang)
    )
    with pytest.raises(WorkerError, match="the reference died"):
        add_columns(SimpleNamespace(replace=dict), roles, False, SimpleNamespace(timer=Timer()))
    assert hanging[0].is_alive() and hanging[0].daemon, "nor does the process wait for it"
    go_on.set()
