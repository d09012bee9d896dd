"""Requests as columns: the very requests that they were made of, in any selection, and no texts where none are read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from rlhf_ray.roles.protocols import Request
from rlhf_ray.roles.requests import Requests
from rlhf_ray.sample import SampleSeeds, sample_seed

PROMPT, FAR, ROW = (5, 6), 2**62 + 1, {"answer": "long"}
ASKED = [
    Request(-1, -2, PROMPT, FAR, columns=ROW, chat="chat"),
    Request(-1, -1, PROMPT, 7, columns=ROW, chat="chat", temperature=0.0),
    Request(4, 9, (5,), 8, answer=(3, 1)),
]  # fmt: skip


def test_columns_hold_the_very_requests():
    requests = Requests.of(ASKED)
    assert requests.tokens == (PROMPT, (5,)), "the members of a group have one prompt"
    assert list(requests) == ASKED and len(requests) == 3
    assert [requests[0], requests[-1]] == [ASKED[0], ASKED[2]] and list(requests[1:]) == ASKED[1:]
    assert list(requests.select(np.array([2, 0]))) == [ASKED[2], ASKED[0]]
    assert requests[2:].temperature is not None and Requests.of(ASKED[2:]).temperature is None
    assert requests.texts_by_id == {-1: (ROW, "chat"), 4: ({}, None)}
    with pytest.raises(IndexError):
        requests[3]


def test_requests_travel_without_the_texts_of_their_prompts():
    sent = pickle.loads(pickle.dumps(Requests.of(ASKED).without_texts()))
    bare = [Request(-1, -2, PROMPT, FAR), Request(-1, -1, PROMPT, 7, temperature=0.0), ASKED[2]]
    assert list(sent) == bare and [r.columns for r in sent] == [{}] * 3


def test_a_prompt_that_is_asked_twice_is_two_prompts():
    requests = Requests.of([Request(3, 0, PROMPT, 1, columns={"x": 1}), Request(8, 1, PROMPT, 1, columns={"x": 2})])
    assert [r.columns["x"] for r in requests] == [1, 2] and set(requests.texts_by_id) == {3, 8}


def test_seeds_that_are_computed_late_are_the_same():
    seeds = SampleSeeds(7, np.array([4, 4, 9]), np.array([0, 1, 0]))
    assert [seeds[i] for i in range(3)] == [sample_seed(7, 4, 0), sample_seed(7, 4, 1), sample_seed(7, 9, 0)]
    assert seeds[np.array([2, 1])][0] == sample_seed(7, 9, 0)
