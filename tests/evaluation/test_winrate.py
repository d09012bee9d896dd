import math
import random

import pytest

from rlhf_ray.evaluation.winrate import outcomes_of_scores, wilson, win_rate


def test_outcomes_of_scores():
    other = [False] * 3
    assert outcomes_of_scores([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], other) == [-1, 0, 1]
    assert outcomes_of_scores([1.0, 2.0], [1.5, 1.0], other[:2], tie_margin=0.5) == [0, 1]
    assert outcomes_of_scores([math.nan, 1.0], [0.0, 2.0], other[:2]) == [-1], "no score, no comparison"


def test_the_same_answer_is_a_tie_up_to_rounding():
    ours, theirs = [1.0, 1.0, 1.0, math.nan], [1.0 + 1e-7, 1.0 + 1e-7, 0.9, 1.0]
    assert outcomes_of_scores(ours, theirs, [True, False, True, True]) == [0, -1, 1], "tokens may differ behind a text"


def test_ties_are_counted_and_left_out():
    result = win_rate([[1], [1], [1], [-1], [0], [0]])
    assert (result.wins, result.losses, result.ties, result.rate) == (3, 1, 2, 0.75)
    assert result.interval == "wilson"


def test_wilsons_interval_by_hand():
    # z = 1.96, n = 10, p = 0.7: centre (p + z^2/2n) / (1 + z^2/n) = 0.6445, half width 0.2477
    low, high = wilson(7, 10)
    assert low == pytest.approx(0.3968, abs=1e-4) and high == pytest.approx(0.8922, abs=1e-4)
    assert wilson(10, 10)[1] == 1.0 and wilson(10, 10)[0] == pytest.approx(10 / (10 + 1.96**2), abs=1e-4)


def test_nothing_decided():
    result = win_rate([[0], [0, 0]])
    assert (result.rate, result.low, result.high, result.ties) == (None, None, None, 3)


def test_several_answers_to_a_prompt_are_not_so_many_independent_ones():
    """100 prompts, all four answers of each alike: no more is known than from one answer each."""
    draw = random.Random(0)
    prompts = [draw.choice([1, 1, -1]) for _ in range(100)]
    once, often = win_rate([[p] for p in prompts]), win_rate([[p] * 4 for p in prompts])
    assert once.rate == often.rate and often.interval == "bootstrap" and once.interval == "wilson"
    assert often.wins == 4 * once.wins
    assert often.low == pytest.approx(once.low, abs=0.02) and often.high == pytest.approx(once.high, abs=0.02)
    naive = wilson(often.wins, often.wins + often.losses)
    assert often.high - often.low > 1.5 * (naive[1] - naive[0])
    assert win_rate([[p] * 4 for p in prompts]) == often, "the same seed, the same interval"


def test_the_bootstrap_by_hand():
    # Two decided prompts, one won and one lost: the draws are (w,w), (w,l), (l,w), (l,l), so the rate is 0, 1/2 or 1
    result = win_rate([[1, 1], [-1, -1], [0, 0]])
    assert (result.low, result.rate, result.high, result.ties) == (0.0, 0.5, 1.0, 2)


@pytest.mark.parametrize("outcomes", [[[1, 1], [1, 0], [1, 1]], [[1, -1], [0, 0]]], ids=["wins only", "one prompt"])
def test_where_a_bootstrap_would_have_no_width(outcomes):
    result = win_rate(outcomes)
    assert result.interval == "wilson" and result.low < result.rate and result.high - result.low > 0.3
