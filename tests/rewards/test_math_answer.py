"""The math reward: all of GSM8K's test answers, and answers that keep a computer algebra system busy."""

from __future__ import annotations

import threading
import time

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.rewards.math_answer import final_part, math_answer


@pytest.mark.parametrize(
    ("completion", "right", "value"),
    [
        ("The answer is 18.", "#### 18", 1.0),
        (r"so \boxed{\frac{36}{2}}", "18", 1.0),
        ("#### 70,000", "#### 70000", 1.0),
        ("#### $18.00", "#### 18", 1.0),
        ("18 apples, no: #### 17", "#### 18", 0.0),
        ("0.3333", r"\frac{1}{3}", 0.0),
        ("", "#### 18", 0.0),
        ("I do not know", "#### 18", 0.0),
    ],
)
def test_by_hand(completion, right, value):
    assert math_answer([completion], answer=[right]).values == (value,)


def test_the_final_part():
    assert final_part("3+4=7 #### 7 \n") == "7" and final_part("#### 1 #### 2") == "2"
    assert final_part("seven") == "seven"


def test_gsm8k_answers_are_right_and_shifted_ones_are_not(shared_data):
    from rlhf_ray.data.rows import read_rows

    answers = [row.fields["answer"] for row in read_rows(str(shared_data / "gsm8k.test.jsonl"))]
    assert len(answers) == 600
    assert sum(math_answer(answers, answer=answers).values) == 600
    shifted = answers[1:] + answers[:1]
    equal = [float(final_part(a) == final_part(b)) for a, b in zip(answers, shifted, strict=True)]
    assert list(math_answer(shifted, answer=answers).values) == equal and sum(equal) < 10


def test_an_answer_that_cannot_be_checked_in_time_is_wrong_and_the_next_one_is_checked():
    """Also outside the main thread, where signals, math-verify's own time limits, do not exist."""
    found = {}

    def score():
        towers = ["$9^{9^{9^{9^9}}}$", "#### 18"]
        found["values"] = math_answer(towers, answer=["18", "18"], seconds=0.5).values

    thread = threading.Thread(target=score)
    started = time.monotonic()
    thread.start()
    thread.join(20)
    assert found["values"] == (0.0, 1.0) and time.monotonic() - started < 10


def test_an_unreadable_answer_in_the_data_is_a_failure_of_its_row():
    outcome = math_answer(["1", "2"], answer=["no number here", "2"])
    assert outcome.values == (None, 1.0)
    assert "cannot read the data's own answer 'no number here'" in outcome.failures[0].what
    rewards = RewardSet([load_reward("math", policy=FailurePolicy("drop_group"))]).score(
        ["a", "a", "b"], ["1", "1", "2"], [[1]] * 3, [{"answer": "none"}, {"answer": "1"}, {"answer": "2"}]
    )
    assert rewards.keep == [False, False, True] and rewards.by_function["math"][1:] == [1.0, 1.0]


def test_a_missing_column_is_explained():
    with pytest.raises(ConfigError, match="no column 'answer', only solution; set args.column"):
        math_answer(["1"], solution=["1"])
    assert math_answer(["1"], column="solution", solution=["1"]).values == (1.0,)
