"""How a step's requests are cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.remote.split import even_pieces, fixed_pieces
from rlhf_ray.roles.protocols import Request
from rlhf_ray.roles.requests import Requests


def requests_of(*groups: tuple[int, int]) -> Requests:
    """(answers, prompt tokens) of each group."""
    return Requests.of([
        Request(prompt, 100 * prompt + member, (0,) * tokens, seed=0)
        for prompt, (answers, tokens) in enumerate(groups)
        for member in range(answers)
    ])


def prompts_of(pieces) -> list[list[int]]:
    return [[r.prompt_id for r in piece] for piece in pieces]


def test_fixed_pieces_are_those_of_one_generator():
    pieces = fixed_pieces(requests_of((4, 1), (4, 1), (2, 1)), 4)
    assert prompts_of(pieces) == [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2]]


def test_even_pieces_keep_groups_whole():
    assert prompts_of(even_pieces(requests_of((2, 3), (2, 3), (2, 3)), 2, 5)) == [[0, 0], [1, 1, 2, 2]]
    assert prompts_of(even_pieces(requests_of((2, 3), (2, 3), (2, 3), (2, 3)), 2, 5)) == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_even_pieces_are_even_in_tokens_not_in_rows():
    # Tokens with 2 new ones each: 12, 4, 4, 4. Half of 24 is the first group.
    assert prompts_of(even_pieces(requests_of((1, 10), (1, 2), (1, 2), (1, 2)), 2, 2)) == [[0], [1, 2, 3]]


def test_fewer_groups_than_generators():
    assert prompts_of(even_pieces(requests_of((3, 2)), 4, 5)) == [[0, 0, 0]]
    assert prompts_of(even_pieces(requests_of((1, 2), (1, 2)), 4, 5)) == [[0], [1]]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(0, 30),
)
def test_even_pieces_lose_nothing_and_split_no_group(groups, count, new_tokens):
    requests = requests_of(*groups)
    pieces = even_pieces(requests, count, new_tokens)
    assert [r for piece in pieces for r in piece] == list(requests)
    assert 1 <= len(pieces) <= count and all(pieces)
    assert all(a[-1].prompt_id != b[0].prompt_id for a, b in zip(pieces, pieces[1:], strict=False))
