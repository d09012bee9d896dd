import threading

import pytest

from rlhf_ray.run.timer import Timer


def test_seconds_add_up_by_name_and_start_again_when_taken(clock):
    timer = Timer(clock)
    with timer("step"):
        with timer("generate"):
            clock.now += 2
        with timer("generate"):
            clock.now += 3
        clock.now += 1
    assert timer.take() == {"time/generate": 5.0, "time/step": 6.0}
    assert timer.take() == {}


def test_a_part_that_fails_counts_too(clock):
    timer = Timer(clock)
    with pytest.raises(RuntimeError), timer("reward"):
        clock.now += 4
        raise RuntimeError
    assert timer.take() == {"time/reward": 4.0}


def test_threads_lose_nothing():
    timer = Timer()
    threads = [threading.Thread(target=lambda: [timer.add("x", 1.0) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.take() == {"time/x": 8000.0}
