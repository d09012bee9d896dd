import math

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.perplexity import measure_perplexity, windows_of


def test_perplexity_by_hand():
    """Two texts; three tokens are scored with probabilities 1/2, 1/4 and 1/8: perplexity 4."""
    table = {(5, 6, 7): [0.0, math.log(1 / 2), math.log(1 / 4)], (8, 9): [0.0, math.log(1 / 8)]}
    result = measure_perplexity(
        lambda rows: [table[tuple(row)] for row in rows], ["ab c", "dé"], [(5, 6, 7), (8, 9)], window=8
    )
    assert result.tokens == 3 and result.per_token == pytest.approx(4.0)
    assert result.byte_count == 7 and result.bits_per_byte == pytest.approx(6 / 7)


def test_every_token_but_the_first_counts_once():
    for length in range(2, 30):
        for size in range(2, 9):
            windows = windows_of(0, range(length), size)
            scored = [token for w in windows for token in w.tokens[len(w.tokens) - w.scored :]]
            assert scored == list(range(1, length)), (length, size)
            assert all(len(w.tokens) <= size and w.scored < len(w.tokens) for w in windows)


def test_a_later_token_sees_at_least_half_a_window():
    assert [(w.tokens, w.scored) for w in windows_of(3, range(7), 4)] == [
        ((0, 1, 2, 3), 3), ((2, 3, 4, 5), 2), ((3, 4, 5, 6), 1),
    ]  # fmt: skip


def test_long_texts_are_read_in_windows_and_batches():
    asked = []

    def half(rows):
        asked.append([len(row) for row in rows])
        return [[0.0] + [math.log(0.5)] * (len(row) - 1) for row in rows]

    result = measure_perplexity(half, ["x" * 9, "y"], [range(9), (1,)], window=4, batch_size=2)
    assert result.per_token == pytest.approx(2.0) and result.tokens == 8
    assert asked == [[4, 4], [4, 4]]
    assert result.byte_count == 9, "a text of one token has nothing to predict"


def test_nothing_to_predict():
    with pytest.raises(DataError, match="no text has two tokens"):
        measure_perplexity(lambda rows: [], ["a"], [(1,)], window=4)
