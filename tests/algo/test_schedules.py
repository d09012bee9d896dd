from __future__ import annotations

import pytest

from rlhf_ray.algo.schedules import linear


def test_a_straight_line_from_the_first_step_to_the_last():
    assert [linear(1.0, 0.4, step, 4) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.4])


def test_without_an_end_nothing_moves():
    assert [linear(0.7, None, step, 4) for step in (0, 3)] == [0.7, 0.7]
    assert linear(0.7, 0.1, 0, 1) == 0.7, "a run of one step has no way to go"
