from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import ConfigError


def test_every_epoch_visits_every_example_once_in_its_own_order():
    stream = PromptStream(10, seed=3)
    epochs = [stream.take(10 * e, 10) for e in range(4)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * 10
        assert sorted(index for _, index in epoch) == list(range(10))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 4


@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 10**9))
def test_a_position_alone_decides(n, seed, position):
    assert PromptStream(n, seed)[position] == PromptStream(n, seed).take(max(0, position - 1), 2)[position > 0]


def test_the_order_is_fixed_for_ever():
    # A resumed run must go on in the order it began with: these numbers may never change.
    assert [index for _, index in PromptStream(8, seed=0).take(0, 16)] == [
        7,
        0,
        1,
        5,
        3,
        4,
        2,
        6,
        5,
        7,
        6,
        1,
        0,
        2,
        4,
        3,
    ]


def test_each_first_example_is_equally_likely():
    counts = [0] * 4
    for seed in range(4000):
        counts[PromptStream(4, seed)[0][1]] += 1
    assert all(900 < count < 1100 for count in counts)  # 1000 expected, standard deviation 27


def test_refusals():
    with pytest.raises(ConfigError, match="0 examples"):
        PromptStream(0, seed=0)
    with pytest.raises(IndexError, match="positions count from 0"):
        PromptStream(3, seed=0)[-1]
