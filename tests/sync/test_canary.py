from __future__ import annotations

import math

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.sync.canary import Canary, absdiff_max, canary_tokens, judge

OLD = [[0.0, -1.0, -2.0]]
NEW = [[0.0, -1.5, -2.0]]


class Generator:
    def __init__(self, logps, version):
        self.logps, self.version = logps, version

    def logprobs(self, tokens):
        return self.logps


def verdict(generator, *, held=2, previous=OLD, bound=0.01):
    return judge(generator, NEW, previous, held=held, expected=2, bound=bound)


def test_equal_within_the_bound():
    good = verdict([[0.0, -1.504, -2.001]])
    assert good.ok and good.cause == "" and good.absdiff_max == pytest.approx(0.004)


def test_four_ways_to_be_wrong():
    missed = verdict(NEW, held=1)
    assert (missed.ok, missed.cause) == (False, "stale version") and "version 1 where 2" in missed.reason
    cached = verdict(OLD)
    assert cached.cause == "stale version" and "prefix cache" in cached.reason and cached.absdiff_max == 0.5
    rounded = verdict([[0.0, -1.55, -2.0]])
    assert rounded.cause == "kernels" and "dtype" in rounded.reason
    scrambled = verdict([[0.0, -4.0, -2.0]])
    assert scrambled.cause == "wrong weights" and "2.5 nats" in scrambled.reason


def test_a_step_smaller_than_the_bound_cannot_be_called_stale():
    assert judge([[0.0, -1.001]], [[0.0, -1.0]], [[0.0, -1.001]], held=3, expected=3, bound=0.01).ok
    near_both = judge([[0.0, -1.02]], [[0.0, -1.0]], [[0.0, -1.012]], held=3, expected=3, bound=0.015)
    assert near_both.cause == "kernels", "nothing says that it is the old weights"


def test_not_comparable_is_wrong_not_fine():
    assert absdiff_max([[0.0, math.nan]], [[0.0, -1.0]]) == math.inf
    assert absdiff_max([[0.0]], [[0.0, -1.0]]) == math.inf
    assert absdiff_max([[0.0, -math.inf]], [[0.0, -math.inf]]) == math.inf
    assert verdict([[0.0, math.nan, -2.0]]).cause == "wrong weights"


def test_a_broken_learner_is_not_the_generators_fault():
    broken = [[0.0, math.nan, -2.0]]
    found = judge(broken, broken, OLD, held=2, expected=2, bound=0.01)
    assert (found.ok, found.cause) == (False, "diverged") and "earlier checkpoint" in found.reason


def test_canary_remembers_the_sync_before():
    canary = Canary([[1, 2, 3]], bound=0.01)
    first = canary.check([Generator(OLD, 1), Generator(OLD, 1)], OLD, 1)
    assert [v.ok for v in first] == [True, True]
    second = canary.check([Generator(NEW, 2), Generator(OLD, 2)], NEW, 2)
    assert [v.cause for v in second] == ["", "stale version"]


def test_tokens_are_fixed_and_in_range():
    tokens = canary_tokens(14, count=3, length=5, seed=1)
    assert tokens == canary_tokens(14, count=3, length=5, seed=1) != canary_tokens(14, count=3, length=5, seed=2)
    assert [len(row) for row in tokens] == [5, 5, 5] and all(0 <= t < 14 for row in tokens for t in row)


def test_canary_that_checks_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        Canary([[1]])
    with pytest.raises(ConfigError, match="above 0"):
        Canary([[1, 2]], bound=0.0)
