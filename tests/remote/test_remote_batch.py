"""The driver's view of a batch: references and numbers. Strings stand in for Ray's references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rlhf_ray.remote.batch import COLUMNS, Part, RemoteBatch, RemoteColumn, gather_remote
from rlhf_ray.remote.calls import Worker
from rlhf_ray.roles.batch import Rows

ROWS = Rows((7, 7, 8), (3, 4, 2), (1, 2, 1), (False, True, False), (0, 0, 0), (2, 2, 1), (5, 5, 6))
ONE, TWO = Worker("generator 0", None), Worker("generator 1", None)


def batch_of_three() -> RemoteBatch:
    parts = (
        Part(ONE, "first", np.array([0, 1]), np.array([0, 1])), Part(TWO, "second", np.array([0]), np.array([2])),
    )  # fmt: skip
    return RemoteBatch(parts, ROWS, {7: ({"kind": "a"}, None), 8: ({"kind": "b"}, "chat")})


def test_columns_are_the_optional_fields():
    assert COLUMNS == (
        "temperature", "score", "baseline", "logp_old", "logp_ref", "values", "advantages", "returns",
    )  # fmt: skip


def test_replace_leaves_the_original_alone():
    first, column = batch_of_three(), RemoteColumn((), "column")
    second = first.replace(logp_ref=column, score=torch.ones(3))
    assert first.values == {} and second.logp_ref is column and second.score.tolist() == [1, 1, 1]
    assert second.replace(logp_ref=None).logp_ref is None and second.logp_ref is column
    assert second.rows is ROWS and len(second) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.rows = ROWS


def test_prompts_are_told_once_and_stand_at_every_row():
    assert [row["kind"] for row in batch_of_three().columns] == ["a", "a", "b"]


def test_who_has_written_a_row():
    mixed = gather_remote([(batch_of_three(), [2, 0])])
    assert [mixed.writer_of(row).partition(" (")[0] for row in (0, 1)] == ["generator 1", "generator 0"]


def test_a_per_token_tensor_must_not_pass_through_the_driver():
    with pytest.raises(TypeError, match=r"'logp_ref' is a tensor of shape \(2, 4\) on the driver"):
        batch_of_three().replace(logp_ref=torch.zeros(2, 4))


def test_unknown_column():
    with pytest.raises(TypeError, match="'tokens' is not a column; columns are temperature, score, baseline, logp_old"):
        batch_of_three().replace(tokens=RemoteColumn((), "x"))


def test_gathered_rows_stay_where_they_lie():
    batch = batch_of_three()
    mixed = gather_remote([(batch, [2, 0]), (batch, [1])])
    assert mixed.rows == Rows.cat([ROWS.select([2, 0]), ROWS.select([1])]) and mixed.prompts == batch.prompts
    lies = {int(row): (part.ref, int(place)) for part in mixed.parts for row, place in
            zip(part.rows, part.places, strict=True)}  # fmt: skip
    assert lies == {0: ("second", 0), 1: ("first", 0), 2: ("first", 1)}


def test_rows_join_in_order():
    other = Rows((8,), (5,), (3,), (False,), (1,), (2,), (9,))
    assert Rows.cat([ROWS, other]).lengths.tolist() == [3, 4, 2, 5] and Rows.cat([ROWS, other]).select([3]) == other
