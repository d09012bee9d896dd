from __future__ import annotations

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.builtin import exact_answer, keyword, length_penalty, regex, repetition_penalty, sentiment


def test_exact_answer():
    assert exact_answer(["122", " 122\n", "1220", ""], answer=["122", "122", "122", "122"]) == [1, 1, 0, 0]
    assert exact_answer(["5"], answer=[5]) == [1]  # a number column of a parquet file


def test_sentiment_of_vader():
    good, bad, neutral, empty = sentiment(["a good movie", "a bad movie", "a movie", ""])
    # VADER: good has valence 1.9, compound = 1.9 / sqrt(1.9**2 + 15) = 0.4404; bad has -2.5: -0.5423
    assert (good, bad, neutral, empty) == (0.4404, -0.5423, 0.0, 0.0)


def test_length_penalty():
    assert length_penalty(completion_ids=[[1] * 3, [1] * 5, []], free_tokens=3, per_token=0.5) == [0, -1, 0]


def test_repetition_penalty():
    # bigrams of 1 2 1 2 1: 12 21 12 21, two of four are new
    assert repetition_penalty(completion_ids=[[1, 2, 1, 2, 1], [1, 2, 3], [7], []]) == [-0.5, 0, 0, 0]
    assert repetition_penalty(completion_ids=[[1, 1, 2]], n=1) == [2 / 3 - 1]


def test_keyword_counts_whole_words():
    texts = ["Great fun!", "greatest", "it was great, a joy"]
    assert keyword(texts, keywords=["great", "joy"]) == [0.5, 0, 1]
    assert keyword(["c++ is (ok)"], keywords=["c++", "(ok)"]) == [1]
    for wrong in ("great", []):
        with pytest.raises(ConfigError, match="list of at least one word"):
            keyword(texts, keywords=wrong)


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
