"""A batch on its way into a checkpoint and back, with a driver that holds what Ray would."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_ray.remote import store
from rlhf_ray.remote.batch import Part, RemoteColumn, gather_remote
from rlhf_ray.remote.calls import Deadline, Worker
from rlhf_ray.remote.packed import Packed, Ragged
from rlhf_ray.roles.batch import Batch, batch_of
from rlhf_ray.sample import Sample


@pytest.fixture
def here(monkeypatch) -> store.RemoteStore:
    monkeypatch.setattr(store.ray, "put", lambda value: value)
    crew = SimpleNamespace(results=lambda calls: [call.ref for call in calls])
    return store.RemoteStore(crew, Worker("generator", None), Deadline(1, ""))


def batch(*prompts: int) -> Batch:
    """Row i answers prompts[i], with i + 1 tokens."""
    samples = [
        Sample.answer(prompt, row, [7] * (row + 2), [8] * (row + 1), [-0.5 * row] * (row + 1), 3, "stop")
        for row, prompt in enumerate(prompts)
    ]
    columns = [{"answer": prompt} for prompt in prompts]
    return batch_of(samples, columns, [None] * len(prompts)).replace(score=torch.arange(len(prompts)).float())


def same(one: Batch, other: Batch) -> bool:
    values = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Batch)]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in values if isinstance(a, torch.Tensor))


def test_there_and_back(here):
    whole = batch(4, 4, 6)
    placed = here.place(whole)
    assert placed.rows == whole.rows and placed.columns == whole.columns
    assert placed.score.tolist() == [0, 1, 2] and placed.baseline is None
    assert same(here.fetch(placed), whole)


def test_rows_of_several_batches_come_in_their_order(here):
    one, other = here.place(batch(4, 4, 6)), here.place(batch(9, 9))
    chosen = gather_remote([(one, [2, 0]), (other, [1])]).replace(score=torch.tensor([5.0, 6.0, 7.0]))
    found = here.fetch(chosen)
    assert found.prompt_id.tolist() == [6, 4, 9] and found.rows.response_lengths.tolist() == [3, 1, 2]
    assert found.score.tolist() == [5, 6, 7] and found.logp_gen.sum(1).tolist() == [-3, 0, -1]


def test_what_workers_have_computed_comes_along(here):
    placed = here.place(batch(4, 6))
    held = {"out": Ragged(np.array([0.5, -1.0, -2.0], np.float32), np.array([1, 2]))}
    swapped = Packed(held).select(np.array([1, 0]))
    parts = (Part(Worker("rank", None), swapped, np.array([1, 0]), np.array([0, 1])),)
    found = here.fetch(placed.replace(logp_old=RemoteColumn(parts, "out")))
    assert found.logp_old.tolist() == [[0, 0, 0.5, 0, 0], [0, 0, 0, -1, -2]]
