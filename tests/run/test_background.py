"""Calls in threads that nobody has to wait for."""

import subprocess
import sys
import threading

import pytest

from rlhf_ray.run.background import Background


def test_calls_begin_in_order_and_give_what_they_return_or_raise():
    begun = []

    def call(number: int) -> int:
        begun.append(number)
        return 60 // number

    with Background(1, "a test") as thread:
        found = [thread.submit(call, number) for number in (3, 0, 5)]
        assert found[2].result(20) == 12 and found[0].result(20) == 20
        with pytest.raises(ZeroDivisionError):
            found[1].result(20)
    assert begun == [3, 0, 5]


def test_so_many_run_at_once():
    barrier = threading.Barrier(2, timeout=20)
    with Background(2, "a test") as threads:
        found = [threads.submit(barrier.wait) for _ in range(2)]
        assert sorted(future.result(20) for future in found) == [0, 1]


def test_after_the_end_nothing_begins_any_more_and_nobody_waits():
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> str:
        begun.set()
        return "went on" if go_on.wait(20) else "nobody let it go on"

    with Background(1, "a test") as thread:
        hangs, waits = thread.submit(hang), thread.submit(pytest.fail)
        assert begun.wait(20)
    assert waits.cancelled() and not hangs.done()
    go_on.set()
    assert hangs.result(20) == "went on"


def test_a_process_ends_though_a_call_hangs():
    lines = (
        "import threading",
        "from rlhf_ray.run.background import Background",
        "with Background(1, 'a test') as thread:",
        "    thread.submit(threading.Event().wait)",
        "    raise SystemExit(130)",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=60, check=False).returncode == 130
