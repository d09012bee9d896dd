"""How varied texts are. Each Chinese test is the twin of an English one: a character for each word, the same value."""

import pytest
from sacrebleu.metrics import BLEU

from rlhf_ray.evaluation.text import distinct_n, distinct_ngrams, evenly_spaced, self_bleu


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4), "ab, ba, ab and ab"
    assert distinct_n(["a b a b", "a b"], 3) == 1.0, "aba and bab"
    assert distinct_n(["a"], 2) == 1.0 and distinct_n([], 1) == 1.0


def test_distinct_n_of_the_chinese_twin():
    assert distinct_n(["甲乙甲乙", "甲乙"], 1) == pytest.approx(2 / 6)
    assert distinct_n(["甲乙甲乙", "甲乙"], 2) == pytest.approx(2 / 4)
    assert distinct_n(["甲乙甲乙", "甲乙"], 3) == 1.0
    assert distinct_n(["甲"], 2) == 1.0


def test_one_repeated_character_is_not_varied():
    assert distinct_n(["好好好好好好好好好好"], 1) == pytest.approx(1 / 10)
    assert distinct_n(["好" * 9, "好，好，" * 4], 2) == pytest.approx(2 / 15), "好好 8 times, 好，好， 7 times"
    assert distinct_n(["good, good, good,"], 1) == distinct_n(["好，好，好，"], 1) == pytest.approx(1 / 3)
    # Thai, Japanese: as many characters as there are; Arabic and Hindi: words, however many signs are on them
    assert distinct_n(["ดีดีดีดี"], 1) == pytest.approx(2 / 8)
    assert distinct_n(["すごいすごい"], 1) == pytest.approx(3 / 6)
    assert distinct_n(["جَيِّد جَيِّد جدا"], 1) == pytest.approx(2 / 3)
    assert distinct_n(["अच्छी फ़िल्म अच्छी"], 1) == pytest.approx(2 / 3)


def test_chinese_words_if_asked_for():
    assert distinct_n(["北京北京清华大学"], 1) == pytest.approx(6 / 8)
    assert distinct_n(["北京北京清华大学"], 1, chinese="words") == pytest.approx(2 / 3)


def test_distinct_n_of_token_ids():
    assert distinct_ngrams([[7, 8, 7, 8], [7, 8]], 1) == pytest.approx(2 / 6)
    assert distinct_ngrams([[7, 8, 7, 8], [7, 8]], 2) == pytest.approx(2 / 4)
    assert distinct_ngrams([], 1) == 1.0


def test_self_bleu_of_equal_and_of_unrelated_texts():
    assert self_bleu(["the cat sat on the mat"] * 3) == 1.0
    assert self_bleu(["a b c d", "e f g h"]) == 0.0, "no common word"


def test_self_bleu_by_hand():
    # "a b c d" against "a b c e": 3/4 words, 2/3 pairs, 1/2 triples, and none of one 4-gram, smoothed to 1/2
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(expected)


def test_self_bleu_of_the_chinese_twin():
    assert self_bleu(["猫坐在垫子上"] * 3) == 1.0
    assert self_bleu(["甲乙丙丁", "戊己庚辛"]) == 0.0
    assert self_bleu(["甲乙丙丁", "甲乙丙戊"]) == pytest.approx(self_bleu(["a b c d", "a b c e"]))


def test_self_bleu_of_chinese_is_that_of_sacrebleus_chinese_tokens():
    texts = ["今天的天气很好，我们去公园。", "今天我们去看GPT-4的3.5版，很好！", "天气不好。"]
    zh = BLEU(effective_order=True, tokenize="zh")
    expected = [zh.sentence_score(t, [other for other in texts if other != t]).score / 100 for t in texts]
    assert self_bleu(texts) == pytest.approx(sum(expected) / 3) and 0.1 < self_bleu(texts) < 0.9


def test_self_bleu_of_other_scripts():
    # by hand as above: a character (Thai with its marks, kana) or a word (Arabic) is a, b, c, d, e
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    for texts in (["กิขุคง", "กิขุคจ"], ["あいうえ", "あいうお"], ["هذا فيلم جيد جدًا", "هذا فيلم جيد حقًا"]):
        assert self_bleu(texts) == pytest.approx(expected)
    # 北京 / 是 / 首都 / 吗 against 北京 / 是 / 首都 / 呢
    assert self_bleu(["北京是首都吗", "北京是首都呢"], chinese="words") == pytest.approx(expected)


def test_one_text_has_no_self_bleu():
    assert self_bleu([]) is None and self_bleu(["alone"]) is None


def test_only_evenly_spaced_texts_are_compared():
    assert evenly_spaced(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert evenly_spaced(list("abc"), 4) == ["a", "b", "c"]
    texts = ["x y z w", "q r s t"] * 50
    assert self_bleu(texts, limit=2) == 1.0, "texts 0 and 50, which are equal"
