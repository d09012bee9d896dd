import math

import pytest

from rlhf_ray.feedback.labelling import Label, agreement, candidates_of, label_by_score, order_bias
from rlhf_ray.rewards.judge import verdict_of
from rlhf_ray.rewards.judge_questions import Opinion


def rows(*args):
    return [(c.prompt, c.first, c.second) for c in candidates_of(*args)]


def test_which_answers_are_compared():
    assert rows("all", 3, [], 2) == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 3, 4), (1, 3, 5), (1, 4, 5)]
    assert rows("disjoint", 5, [], 2) == [(0, 0, 1), (0, 2, 3), (1, 5, 6), (1, 7, 8)]
    assert rows("disjoint", 2, [], 1) == rows("all", 2, [], 1) == [(0, 0, 1)]


def test_the_best_and_the_worst_answer():
    scores = [0.5, 2.0, -1.0, 2.0, 1.0, 1.0, math.nan, 1.0, math.nan, 3.0, math.nan, math.nan]
    # the first of two best; of equal ones the first and the last, a tie that is counted; one score is no pair
    assert rows("best_worst", 4, scores, 3) == [(0, 1, 2), (1, 4, 7)]


def test_labels_by_score():
    assert label_by_score([3.0, 1.0, 1.5, math.nan], [1.0, 2.0, 1.0, 0.0], min_margin=0.5) == [
        Label("first", 2.0), Label("second", 1.0), Label("tie", 0.5), Label("none")]  # fmt: skip


def judged(forward, backward):
    verdict = verdict_of(Opinion(forward), Opinion(backward))
    return Label(verdict.winner, None, verdict)


def test_order_bias_by_hand():
    labels = [judged("A", "B"), judged("A", "A"), judged("A", "A"), judged("tie", "A"), Label("none")]
    # 2 of 4 pairs contradict themselves; of 7 verdicts that name a place, 6 name A
    assert order_bias(labels) == {"order_bias_rate": 0.5, "named_first_rate": pytest.approx(6 / 7)}
    assert order_bias([judged("tie", "tie")]) == {"order_bias_rate": 0.0}
    assert order_bias([Label("first", 1.0)]) == {}, "a reward looks at one answer at a time"


def test_agreement_with_people_by_hand():
    labels = [judged("A", "B")] * 7 + [judged("B", "A")] * 3 + [judged("A", "A")] * 2 + [Label("none")]
    result = agreement(labels)
    assert (result["agreement"], result["agreed"], result["disagreed"]) == (0.7, 7, 3)
    assert (result["ties"], result["unjudged"]) == (2, 1)
    assert result["low"] == pytest.approx(0.3968, abs=1e-4) and result["high"] == pytest.approx(0.8922, abs=1e-4)
    assert result["order_bias_rate"] == pytest.approx(2 / 12)
    assert agreement([judged("A", "A")])["agreement"] is None
