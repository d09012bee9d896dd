"""Built-in rewards. Each Chinese test is the twin of an English one: a character for each word, the same value."""

from __future__ import annotations

import warnings

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards import builtin
from rlhf_ray.rewards.builtin import exact_answer, keyword, length_penalty, regex, repetition_penalty, sentiment
from rlhf_ray.rewards.compose import RewardSet, load_reward


def test_exact_answer():
    assert exact_answer(["122", " 122\n", "1220", ""], answer=["122", "122", "122", "122"]) == [1, 1, 0, 0]
    assert exact_answer(["5"], answer=[5]) == [1]  # a number column of a parquet file


def test_sentiment_of_vader():
    good, bad, neutral, empty = sentiment(["a good movie", "a bad movie", "a movie", ""])
    # VADER: good has valence 1.9, compound = 1.9 / sqrt(1.9**2 + 15) = 0.4404; bad has -2.5: -0.5423
    assert (good, bad, neutral, empty) == (0.4404, -0.5423, 0.0, 0.0)


def test_sentiment_says_that_it_reads_english(recwarn):
    builtin._warn_of_other_scripts.cache_clear()
    with pytest.warns(UserWarning, match="VADER's lexicon is English: such texts score 0; use a classifier"):
        assert sentiment(["这部电影很好", "ok"]) == [0.0, 0.296]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentiment(["这部电影很好"])  # once is enough
        builtin._warn_of_other_scripts.cache_clear()
        sentiment(["a good film (好)", "", "12 !"])


def test_length_penalty():
    assert length_penalty(completion_ids=[[1] * 3, [1] * 5, []], free_tokens=3, per_token=0.5) == [0, -1, 0]


def test_repetition_penalty():
    # bigrams of 1 2 1 2 1: 12 21 12 21, two of four are new
    assert repetition_penalty(completion_ids=[[1, 2, 1, 2, 1], [1, 2, 3], [7], []]) == [-0.5, 0, 0, 0]
    assert repetition_penalty(completion_ids=[[1, 1, 2]], n=1) == [2 / 3 - 1]


def test_penalties_by_words_and_characters():
    ids = [[1], [1], [1], [1]]
    texts = ["a b c", "a b c d e", "甲乙丙丁戊", ""]
    counted = length_penalty(completion_ids=ids, completions=texts, free_tokens=3, per_token=0.5, unit="words")
    assert counted == [0, -1, -1, 0]
    texts = ["a b a b a", "甲乙甲乙甲", "甲乙丙", "好，好，好，好，"]
    repeated = repetition_penalty(completion_ids=ids, completions=texts, unit="words")
    assert repeated == pytest.approx([-0.5, -0.5, 0, -2 / 3])
    two = repetition_penalty(completion_ids=ids[:1], completions=["北京北京"], n=1, unit="words", chinese="words")
    assert two == [-0.5]
    with pytest.raises(ConfigError, match="unit='letters'; choose tokens or words"):
        repetition_penalty(completion_ids=ids, completions=texts, unit="letters")


def test_keyword_counts_whole_words():
    texts = ["Great fun!", "greatest", "it was great, a joy"]
    assert keyword(texts, keywords=["great", "joy"]) == [0.5, 0, 1]
    assert keyword(["c++ is (ok)"], keywords=["c++", "(ok)"]) == [1]
    for wrong in ("great", []):
        with pytest.raises(ConfigError, match="list of at least one word"):
            keyword(texts, keywords=wrong)


def test_keyword_of_the_chinese_twin():
    # great = 好, joy = 乐, was = 是, it = 它, a = 一; "greatest" is another word, as 妙 is
    texts = ["好玩！", "妙", "它是好，一乐"]
    assert keyword(texts, keywords=["好", "乐"]) == [0.5, 0, 1]
    assert keyword(["c++是（可以）"], keywords=["c++", "（可以）"]) == [1]


@pytest.mark.parametrize(
    ("text", "word", "there"),
    [
        ("这部电影很好看", "好看", True),
        ("GPT模型很好", "gpt", True),
        ("ChatGPT模型", "GPT", False),
        ("模型ＧＰＴ４", "GPT4", True),  # full width
        ("iPhone手机、安卓", "iphone手机", True),
        ("ﾗｰﾒﾝが好き", "ラーメン", True),  # half width
        ("ราคาน้ำมัน", "น้ำมัน", True),
        ("น้ำ", "น", False),  # part of a character
        ("រី ស្រី", "រ", False),
        ("ប្រី", "រី", False),  # written below another
        ("STRASSE", "Straße", True),
        ("İyi günler", "iyi", True),
        ("ОТЛИЧНЫЙ фильм", "отличный", True),
        ("неотличный", "отличный", False),
        ("هذا كتاب", "كتاب", True),
        ("هذه كتابة", "كتاب", False),
        ("अच्छी फ़िल्म", "अच्छ", False),  # its vowel sign belongs to the word
        ("अच्छी फ़िल्म", "अच्छी", True),
        ("아주 좋은 영화", "좋은", True),
        ("cafe\u0301", "café", True),
        ("cafe\u0301", "cafe", False),
    ],
)
def test_keyword_in_other_scripts(text, word, there):
    assert keyword([text], keywords=[word]) == [float(there)]


def test_keyword_by_chinese_words():
    assert keyword(["东京都很大"], keywords=["京都"]) == [1]
    assert keyword(["东京都很大", "我去京都玩"], keywords=["京都"], chinese="words") == [0, 1]
    assert keyword(["OpenAI很大"], keywords=["openai"], chinese="words") == [1]


def test_a_column_called_like_a_setting_is_none():
    """A translation's rows may well have a column "chinese"."""
    rewards = RewardSet([load_reward("keyword", args={"keywords": ["joy"]})])
    scores = rewards.score(["p"], ["a joy"], [[1]], [{"chinese": "乐", "english": "joy"}])
    assert scores.total == [1.0]


def test_regex_matches_the_whole_completion():
    texts = ["<think>a\nb</think>7", "x <think>a</think>7", "7"]
    assert regex(texts, pattern=r"<think>.*</think>\d+") == [1, 0, 0]
    with pytest.raises(ConfigError, match="not a regular expression"):
        regex(texts, pattern="(")


def test_the_real_reviews_agree_with_their_labels(shared_data):
    from rlhf_ray.data.rows import read_rows

    rows = [row.fields for row in read_rows(str(shared_data / "movie_reviews.test.jsonl"))]
    scores = sentiment([row["text"] for row in rows])
    means = [
        sum(s for s, row in zip(scores, rows, strict=True) if row["label"] == label)
        / sum(row["label"] == label for row in rows)
        for label in (0, 1)
    ]
    assert means[1] - means[0] > 0.2
