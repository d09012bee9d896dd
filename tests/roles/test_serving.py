"""A batch from an engine that writes answers one by one, here a scripted one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.roles import serving
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.sample import Sample

SAMPLING = Sampling(4, stop_token_ids=(1,))
REQUESTS = [
    Request(0, 0, (5, 6), seed=0, columns={"row": 0}),
    Request(0, 1, (5, 6), seed=1, columns={"row": 0}, answer=(10, 11, 1)),
    Request(1, 2, (7,), seed=2, columns={"row": 1}),
    Request(1, 3, (7,), seed=3, columns={"row": 1}, answer=(12, 13, 14, 15, 16)),
]


class ScriptedEngine:
    """Whoever came last ends first, with its sample_id + 20 as its only token, written by version 3."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.waiting: list[Request] = []
        self.fails_at = fails_at

    @property
    def open(self) -> int:
        return len(self.waiting)

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self.waiting += requests

    def collect(self) -> list[Sample]:
        if self.waiting[-1].sample_id == self.fails_at:
            raise KeyboardInterrupt
        one = self.waiting.pop()
        return [Sample.answer(one.prompt_id, one.sample_id, one.token_ids, [one.sample_id + 20], [-0.5], 3, "length")]

    def cancel(self, sample_ids: Sequence[int]) -> None:
        self.waiting = [request for request in self.waiting if request.sample_id not in sample_ids]


def test_sampled_and_given_answers_are_rows_in_the_order_of_their_requests():
    batch = serving.generate(ScriptedEngine(), REQUESTS, SAMPLING, pad_token_id=9)
    assert batch.sample_id.tolist() == [0, 1, 2, 3] and batch.prompt_id.tolist() == [0, 0, 1, 1]
    assert batch.tokens.tolist() == [[5, 6, 20, 9, 9], [5, 6, 10, 11, 1], [7, 22, 9, 9, 9], [7, 12, 13, 14, 15]]
    assert batch.truncated.tolist() == [True, False, True, True], "an answer is cut at max_new_tokens"
    assert batch.rows.weight_version.tolist() == [3, -1, 3, -1], "no weights wrote a given answer"
    assert batch.logp_gen[0].tolist() == [0, 0, -0.5, 0, 0] and not batch.logp_gen[1].any()
    assert [columns["row"] for columns in batch.columns] == [0, 0, 1, 1]


def test_an_answer_that_is_given_needs_no_engine():
    batch = serving.generate(ScriptedEngine(fails_at=0), REQUESTS[1:2], SAMPLING, pad_token_id=9)
    assert batch.tokens.tolist() == [[5, 6, 10, 11, 1]]


def test_what_is_left_after_a_failure_is_cancelled():
    engine = ScriptedEngine(fails_at=0)
    with pytest.raises(KeyboardInterrupt):
        serving.generate(engine, REQUESTS, SAMPLING, pad_token_id=9)
    assert engine.open == 0


def test_requests_of_others_are_not_taken_for_ours():
    engine = ScriptedEngine()
    engine.submit(REQUESTS[:1], SAMPLING)
    with pytest.raises(RlhfRayError, match="1 requests are open; collect or cancel them first"):
        serving.generate(engine, REQUESTS[2:3], SAMPLING, pad_token_id=9)
    assert engine.open == 1
