from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data import stream
from rlhf_ray.data.stream import (
    LONGEST_CYCLE,
    Part,
    PromptStream,
    apportion,
    by_turns,
    described,
    shares_of,
    stream_over,
)
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


# ---- several sources --------------------------------------------------------------------------------------------

weights = st.lists(
    st.one_of(st.integers(1, 30).map(float), st.integers(1, 9).map(lambda n: n / 10)), min_size=2, max_size=6
)


def parts_of(sizes, weights=None):
    return [Part(f"s{i}", rows, weights and weights[i]) for i, rows in enumerate(sizes)]


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 2**32), st.integers(0, 10**9))
def test_before_any_position_each_source_has_had_its_share_but_for_less_than_one_row(weights, seed, start):
    sizes = [7 + i for i in range(len(weights))]
    stream, share = stream_over(parts_of(sizes, weights), seed), [w / sum(weights) for w in weights]
    drawn = [round(epochs * rows) for epochs, rows in zip(stream.epochs(start), sizes, strict=True)]
    assert sum(drawn) == start
    for position, (_, index) in enumerate(stream.take(start, 40), start=start):
        source = next(i for i in range(len(sizes)) if index < sum(sizes[: i + 1]))
        drawn[source] += 1
        assert all(abs(d - (position + 1) * s) < 1 + 1e-6 for d, s in zip(drawn, share, strict=True))


def test_each_source_has_shuffled_epochs_of_its_own():
    parts = [Part("math", 3, 3.0), Part("chat", 5, 1.0)]
    drawn = stream_over(parts, seed=4).take(0, 60)
    math = [(epoch, index) for epoch, index in drawn if index < 3]
    chat = [(epoch, index - 3) for epoch, index in drawn if index >= 3]
    assert (len(math), len(chat)) == (45, 15)
    for rows, size in ((math, 3), (chat, 5)):
        for start in range(0, len(rows), size):
            assert {epoch for epoch, _ in rows[start : start + size]} == {start // size}
            assert sorted(index for _, index in rows[start : start + size]) == list(range(size))
    assert len({tuple(index for _, index in math[i : i + 3]) for i in range(0, 45, 3)}) > 1
    # Another source, another weight: the order of the rest stays.
    more = stream_over([Part("code", 2, 5.0), Part("math", 3, 1.0)], seed=4).take(0, 60)
    assert [index - 2 for _, index in more if index >= 2] == [index for _, index in math[:10]]


def test_the_order_of_several_sources_is_fixed_for_ever():
    # A resumed run must go on in the order it began with: these numbers may never change.
    parts = [Part("a", 3, 2.0), Part("b", 2, 0.5), Part("c", 2, 1.0)]
    drawn = [index for _, index in stream_over(parts, seed=0).take(0, 14)]
    assert drawn == [2, 1, 6, 0, 3, 2, 5, 0, 1, 5, 1, 4, 2, 6]


def test_one_source_and_sources_without_weights_are_one_set_of_rows():
    whole = PromptStream(8, seed=5).take(0, 40)
    assert stream_over([Part("a", 8, 3.0)], 5).take(0, 40) == whole
    assert stream_over([Part("a", 3), Part("b", 5)], 5).take(0, 40) == whole
    assert stream_over([Part("a", 3), Part("b", 5)], 5).epochs(12) == [1.5, 1.5]


def test_how_often_each_source_was_gone_through():
    stream = stream_over([Part("a", 3, 3.0), Part("b", 4, 1.0)], 0)
    assert stream.epochs(8) == [2.0, 0.5] and stream.epochs(0) == [0.0, 0.0]
    with pytest.raises(IndexError, match="positions count from 0"):
        stream[-1]
    with pytest.raises(ConfigError, match="the source b has no row"):
        stream_over([Part("a", 3, 3.0), Part("b", 0, 1.0)], 0)


def test_shares():
    assert shares_of([0.75, 0.25]) == (3, 1) and shares_of([10, 20, 70]) == (1, 2, 7)
    assert shares_of([0.7, 0.2, 0.1]) == (7, 2, 1), "as they are written: 0.7 is seven tenths"
    fine = shares_of([123_457, 876_543])
    assert fine == (1235, 8765) and sum(fine) == LONGEST_CYCLE, "to one part in ten thousand"


def test_whole_numbers_near_shares():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3] and apportion(4, [0.5, 0.25, 0.25]) == [2, 1, 1]
    assert apportion(10, [8, 1, 1], most=[3, 9, 9]) == [3, 4, 3], "what one cannot have goes to the others"
    assert apportion(10, [1, 1], most=[2, 3]) == [2, 3] and apportion(0, [1, 2]) == [0, 0]
    assert apportion(3, [0, 1]) == [0, 3]


def test_one_of_each_source_in_turn():
    assert by_turns(["a", "a", "a", "b", "c", "c"]) == [0, 3, 4, 1, 5, 2]
    assert by_turns(["", "", ""]) == [0, 1, 2]


def test_a_mixture_is_described():
    assert described([Part("a", 3, 3.0), Part("b", 4, 1.0)]) == (
        "sources: a 75.0% (3 rows), b 25.0% (4 rows); drawn by weight"
    )
    without = described([Part("a", 3), Part("b", 1)])
    assert without.endswith("b 25.0% (1 rows); no weights, so each row comes once an epoch")


def test_an_epochs_order_is_that_of_its_keyed_hashes(monkeypatch):
    """As a list of Python's sorts it, also where the digests are made in several portions."""
    monkeypatch.setattr(stream, "_AT_ONCE", 7)
    by_digest = sorted(range(100), key=lambda i: hashlib.blake2b(f"3/1/{i}".encode(), digest_size=16).digest())
    positions = PromptStream(100, seed=3).take(100, 100)
    assert positions == [(1, index) for index in by_digest] and type(positions[0][1]) is int
