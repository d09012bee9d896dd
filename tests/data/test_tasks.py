from __future__ import annotations

import pytest

from rlhf_ray.data.tasks import arithmetic, is_task, load_task, supervised_pairs
from rlhf_ray.errors import DataError


def test_arithmetic_is_right_and_complete():
    task = load_task("task:arithmetic")
    pairs = {pair.prompt: pair for pair in task.train + task.test}
    assert len(pairs) == 90 * 90
    assert pairs["37+85="].completion == "122" and pairs["37+85="].columns == {"answer": "122"}
    assert pairs["10+10="].completion == "20" and pairs["99+99="].completion == "198"
    assert set("".join(pairs)) | set("".join(p.completion for p in pairs.values())) == set(task.alphabet)


def test_no_test_problem_is_ever_trained_on():
    task = load_task("task:arithmetic")
    assert (len(task.train), len(task.test)) == (7600, 500)
    assert not {p.prompt for p in task.train} & {p.prompt for p in task.test}
    assert supervised_pairs("task:arithmetic") == task.train == task.split("train")


def test_the_split_depends_on_the_seed_alone():
    assert arithmetic() == arithmetic()
    assert {p.prompt for p in arithmetic(seed=1).test} != {p.prompt for p in arithmetic(seed=0).test}
    # a fair sample: the mean sum of all problems is 109, the standard error of 500 is 1.6
    answers = [int(p.completion) for p in arithmetic().test]
    assert abs(sum(answers) / len(answers) - 109) < 6


def test_refusals():
    assert is_task("task:arithmetic") and not is_task("arithmetic.jsonl")
    with pytest.raises(DataError, match="choose one of task:arithmetic"):
        load_task("task:algebra")
    with pytest.raises(DataError, match="train or test"):
        load_task("task:arithmetic").split("validation")
