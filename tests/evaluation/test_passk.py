import itertools

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.passk import mean_pass_at_k, pass_at_k


def test_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5, "3 of the 6 pairs hold the right answer"
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 3) == 0.0 and pass_at_k(4, 2, 3) == 1.0, "any three hold one of the two"


def test_it_is_the_share_of_all_subsets_with_a_right_answer():
    right = [True, False, False, True, False, False, False]
    subsets = list(itertools.combinations(right, 3))
    assert pass_at_k(7, 2, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_mean_over_problems():
    assert mean_pass_at_k([[True, False], [False, False]], 1) == 0.25
    assert mean_pass_at_k([[True, False], [False, False]], 2) == 0.5


def test_no_estimate_from_too_few():
    with pytest.raises(ConfigError, match=r"pass@3 cannot be estimated from 2 answers"):
        pass_at_k(2, 1, 3)
