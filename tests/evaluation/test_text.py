import pytest

from rlhf_ray.evaluation.text import distinct_n, evenly_spaced, self_bleu


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4), "ab, ba, ab and ab"
    assert distinct_n(["a b a b", "a b"], 3) == 1.0, "aba and bab"
    assert distinct_n(["a"], 2) == 1.0 and distinct_n([], 1) == 1.0


def test_self_bleu_of_equal_and_of_unrelated_texts():
    assert self_bleu(["the cat sat on the mat"] * 3) == 1.0
    assert self_bleu(["a b c d", "e f g h"]) == 0.0, "no common word"


def test_self_bleu_by_hand():
    # "a b c d" against "a b c e": 3/4 words, 2/3 pairs, 1/2 triples, and none of one 4-gram, smoothed to 1/2
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(expected)


def test_one_text_has_no_self_bleu():
    assert self_bleu([]) is None and self_bleu(["alone"]) is None


def test_only_evenly_spaced_texts_are_compared():
    assert evenly_spaced(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert evenly_spaced(list("abc"), 4) == ["a", "b", "c"]
    texts = ["x y z w", "q r s t"] * 50
    assert self_bleu(texts, limit=2) == 1.0, "texts 0 and 50, which are equal"
