"""Who is given which group, on simulated times."""

from __future__ import annotations

import heapq
import inspect

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.engines import GENERATORS
from rlhf_ray.remote.dispatch import Dispatch, handover
from rlhf_ray.roles.generator_vllm import VLLMGenerator


def test_each_group_goes_to_whoever_has_the_least_open_work():
    # 9 to the first; 4 and 4 to the second, which then has less; 3 again to it, for 8 is less than 9; 5 to the first.
    dispatch = Dispatch([9, 4, 4, 3, 5], [1] * 5, workers=2, room=9)
    assert dispatch.assign() == {0: [0, 4], 1: [1, 2, 3]}
    assert dispatch.assign() == {} and not dispatch.waiting


def test_equals_are_served_in_their_order():
    assert Dispatch([5] * 7, [1] * 7, workers=3, room=9).assign() == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}


def test_a_slow_worker_does_not_hoard():
    """Four answers fit with each: eight groups of two are open, and the fast one gets all that wait."""
    dispatch = Dispatch([1] * 9, [2] * 9, workers=2, room=4)
    assert dispatch.assign() == {0: [0, 2], 1: [1, 3]}
    for group, then in ((1, [4]), (3, [5]), (4, [6]), (5, [7]), (6, [8])):
        dispatch.ended(1, [group])
        assert dispatch.assign() == {1: then}
    dispatch.ended(1, [7, 8])
    assert not dispatch.done
    dispatch.ended(0, [2, 0])
    assert dispatch.done


def test_a_group_that_is_larger_than_the_room_goes_to_an_empty_worker():
    dispatch = Dispatch([1, 1, 1], [8, 2, 8], workers=2, room=4)
    assert dispatch.assign() == {0: [0], 1: [1]}
    dispatch.ended(1, [1])
    assert dispatch.assign() == {1: [2]}


def test_what_a_lost_worker_had_open_goes_out_first():
    dispatch = Dispatch([1] * 6, [1] * 6, workers=2, room=2)
    assert dispatch.assign() == {0: [0, 2], 1: [1, 3]}
    dispatch.ended(0, [0])
    assert dispatch.lost(0) == [2] and list(dispatch.waiting) == [2, 4, 5]
    assert dispatch.assign() == {}, "the other one has enough"
    dispatch.ended(1, [1, 3])
    assert dispatch.assign() == {1: [2, 4]}
    dispatch.ended(1, [4, 2])
    assert dispatch.assign() == {1: [5]}
    assert dispatch.lost(1) == [5] and not dispatch.done and dispatch.assign() == {}, "nobody is left"


def test_one_that_is_back_gets_work_again():
    """With the load of nothing, whatever it had when it was lost."""
    dispatch = Dispatch([9, 1, 1, 1, 1], [1] * 5, workers=2, room=2)
    assert dispatch.assign() == {0: [0, 3], 1: [1, 2]}
    assert dispatch.lost(0) == [0, 3] and dispatch.assign() == {}, "the other one has enough"
    dispatch.joined(0)
    assert dispatch.assign() == {0: [0, 3]}
    dispatch.ended(0, [0, 3])
    dispatch.ended(1, [1])
    assert dispatch.assign() == {0: [4]}, "the other has one open"

    alone = Dispatch([1, 1], [1, 1], workers=1, room=float("inf"))
    assert alone.assign() == {0: [0, 1]} and alone.lost(0) == [0, 1] and alone.assign() == {}
    alone.joined(0)
    assert alone.assign() == {0: [0, 1]}


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 12),
    st.randoms(),
)
def test_nobody_is_idle_while_groups_wait(groups, workers, room, dice):
    """Each worker writes its groups one behind the other, in simulated times. At every moment either all have work or
    nothing waits; each group is written once; and the end comes soon after the even share."""
    rows, times = zip(*groups, strict=True)
    dispatch = Dispatch(times, rows, workers, room)
    queues: list[list[int]] = [[] for _ in range(workers)]
    ends: list[tuple[int, int, int]] = []  # (when, worker, group)
    written: list[int] = []

    def go_on(now: int) -> None:
        for worker, sent in dispatch.assign().items():
            idle = not queues[worker]
            queues[worker] += sent
            if idle:
                heapq.heappush(ends, (now + times[sent[0]], worker, sent[0]))
        assert all(queues) or not dispatch.waiting
        assert all(sum(rows[g] for g in queue) <= room or len(queue) == 1 for queue in queues)

    now = 0
    go_on(now)
    while ends:
        now, worker, group = heapq.heappop(ends)
        queues[worker].remove(group)
        written.append(group)
        dispatch.ended(worker, [group])
        if queues[worker]:
            heapq.heappush(ends, (now + times[queues[worker][0]], worker, queues[worker][0]))
        go_on(now)
    assert sorted(written) == list(range(len(groups))) and dispatch.done
    held = min(room, 12)  # groups that one may still have open when nothing waits any more
    assert now <= sum(times) / workers + held * max(times)


def test_small_steps_are_handed_over_group_by_group():
    assert [handover(groups, workers) for groups, workers in ((1, 1), (16, 2), (64, 2), (2048, 2))] == [1, 1, 4, 128]


def test_vllm_writes_as_many_side_by_side_as_the_dispatch_believes():
    assert inspect.signature(VLLMGenerator).parameters["max_num_seqs"].default == GENERATORS["vllm"].rows
