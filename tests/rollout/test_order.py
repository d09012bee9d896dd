"""Orders of the prompts, on five of them and on two sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.data.prompt_sources import joined, named
from rlhf_ray.errors import ConfigError
from rlhf_ray.rollout.order import prompt_stream

CURRICULUM = """
def easy_first(rows, epoch, seed):
    # rows have `answer` "0" to "4": how hard they are. The first epoch is the easy ones, each twice.
    hardness = sorted(range(len(rows)), key=lambda i: -int(rows[i]["answer"]))
    return hardness[:2] * 2 if epoch == 0 else hardness
def by_seed(rows, epoch, seed): return [(seed + epoch) % len(rows)]
def first(rows, epoch, seed): return [0, 1]
def beyond(rows, epoch, seed): return [0, len(rows)]
def true(rows, epoch, seed): return [True]
def nothing(rows, epoch, seed): return []
def later(rows, epoch, seed): return [0] if epoch == 0 else []
def broken(rows, epoch, seed): return [rows[0]["difficulty"]]
size = 3
"""


@pytest.fixture
def own(tmp_path) -> str:
    path: Path = tmp_path / "curriculum.py"
    path.write_text(CURRICULUM)
    return str(path)


def indices(stream, count: int) -> list[int]:
    return [index for _, index in stream.take(0, count)]


def test_as_given(prompts):
    stream = prompt_stream(prompts, "as_given", seed=3)
    assert stream.take(3, 4) == [(0, 3), (0, 4), (1, 0), (1, 1)]
    assert stream.epochs(6) == [1.2]


def test_shuffled_is_the_default_order(prompts):
    stream = prompt_stream(prompts, "shuffled", seed=3)
    assert sorted(indices(stream, 5)) == [0, 1, 2, 3, 4] != indices(stream, 5)
    assert indices(stream, 5) != indices(prompt_stream(prompts, "shuffled", seed=4), 5)


def test_a_curriculum_names_rows_epoch_by_epoch(prompts, own):
    stream = prompt_stream(prompts, f"{own}:easy_first", seed=3)
    assert stream.take(0, 7) == [(0, 4), (0, 3), (0, 4), (0, 3), (1, 4), (1, 3), (1, 2)]
    assert stream[9] == (2, 4), "epochs of 4, 5, 5, ... rows"
    assert stream.epochs(3) == [0.75] and stream.epochs(6) == [1.4]
    assert prompt_stream(prompts, f"{own}:easy_first", seed=3)[8] == (1, 0), "a position alone decides"
    assert indices(prompt_stream(prompts, f"{own}:by_seed", seed=3), 4) == [3, 4, 0, 1]


def test_sources_with_weights_have_each_its_own_epochs(prompts, own):
    """Three prompts with weight 2, two with weight 1, which come as positions 1, 4, ... of the stream."""
    mixed = joined([named(prompts.slice(0, 3), "math", 2.0), named(prompts.slice(3, 5), "chat", 1.0)])
    as_given = prompt_stream(mixed, "as_given", seed=3)
    shuffled = prompt_stream(mixed, "shuffled", seed=3)
    sources = [index >= 3 for index in indices(shuffled, 12)]
    assert [index >= 3 for index in indices(as_given, 12)] == sources, "the weights decide the source as before"
    assert [index for index in indices(as_given, 12) if index < 3] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [index for index in indices(as_given, 12) if index >= 3] == [3, 4, 3, 4]
    assert as_given.epochs(6) == shuffled.epochs(6) == [4 / 3, 1.0]
    first = prompt_stream(mixed, f"{own}:first", seed=3)
    assert set(indices(first, 12)) == {0, 1, 3, 4}, "indices count from each source's first row"


def test_sources_without_weights_are_one_set(prompts):
    both = joined([named(prompts.slice(0, 3), "math"), named(prompts.slice(3, 5), "chat")])
    stream = prompt_stream(both, "as_given", seed=3)
    assert indices(stream, 6) == [0, 1, 2, 3, 4, 0] and stream.epochs(5) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("as_givn", "rollout.order=as_givn is unknown: did you mean as_given?"),
        ("random", "it is shuffled, as_given, or module:function of your own"),
        ("{own}:beyond", "epoch 0 has 5, which is no index; return some of the whole numbers from 0 to 4"),
        ("{own}:true", "epoch 0 has True, which is no index"),
        ("{own}:nothing", "epoch 0 is empty"),
        ("{own}:broken", r"failed for epoch 0 \(KeyError: 'difficulty'\); mend it\n.*curriculum.py:\d+ in broken"),
        ("{own}:size", "is a int, not a function"),
        ("{own}:easy_frst", "has no 'easy_frst'; did you mean 'easy_first'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(prompts, own, order, said):
    with pytest.raises(ConfigError, match=said):
        prompt_stream(prompts, order.format(own=own), seed=0)


def test_an_epoch_that_comes_later_is_looked_at_too(prompts, own):
    stream = prompt_stream(prompts, f"{own}:later", seed=0)
    with pytest.raises(ConfigError, match="the order of epoch 1 is empty"):
        stream[1]
