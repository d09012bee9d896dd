"""Long lists whose items are made when asked for."""

import numpy as np
import pytest

from rlhf_ray.data.token_rows import Bounds, Joined, Made, TokenRows, joined_rows, mapped

PLAIN = ((5, 6), (9,), (1, 2, 3), (4,))


@pytest.fixture
def rows():
    return TokenRows(np.array([5, 6, 9, 1, 2, 3, 4], np.int32), np.array([2, 3, 6, 7]), np.array([6, 9, 3, 4]))


def test_rows_are_those_of_the_array(rows):
    assert tuple(rows) == PLAIN and len(rows) == 4 and rows[-1] == (4,)
    assert type(rows[0][0]) is int, "what JSON and hashes of requests expect"
    assert tuple(rows[1:3]) == PLAIN[1:3] and tuple(rows[1:][1:]) == PLAIN[2:] and tuple(rows[::2]) == PLAIN[::2]
    with pytest.raises(IndexError):
        rows[4]


def test_bounds_need_no_rows(rows, monkeypatch):
    monkeypatch.setattr(TokenRows, "_row", lambda *_: pytest.fail("made a row"))
    assert Bounds.of(rows) == Bounds(3, 9)
    assert Bounds.of(rows[2:]) == Bounds(3, 4) and Bounds.of(rows[1:2]) == Bounds(1, 9)
    assert Bounds.of(joined_rows([rows[2:], [[11]], rows[:0]])) == Bounds(3, 11)
    assert Bounds.of(PLAIN) == Bounds(3, 9)


def test_lists_stand_one_behind_the_other(rows):
    both = joined_rows([rows, [(7,)]])
    assert isinstance(both, Joined) and tuple(both) == (*PLAIN, (7,)) and len(both) == 5
    assert [both[i] for i in (0, 3, 4, -1)] == [(5, 6), (4,), (7,), (7,)] and tuple(both[3:]) == ((4,), (7,))
    assert joined_rows([[1], (2,)]) == (1, 2), "short ones are a tuple"


def test_a_change_waits_until_it_is_asked_for(rows):
    asked = []
    changed = mapped(rows, lambda row: asked.append(row) or row[::-1])
    assert isinstance(changed, Made) and asked == []
    assert changed[2] == (3, 2, 1) and asked == [(1, 2, 3)]
    assert mapped((1, 2), str) == ("1", "2")
