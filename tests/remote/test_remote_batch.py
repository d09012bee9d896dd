"""The driver's view of a batch: references and numbers. Strings stand in for Ray's references."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_ray.batch import Rows, build_batch
from rlhf_ray.remote.batch import COLUMNS, RemoteBatch, RemoteColumn, joined
from rlhf_ray.roles.protocols import Request

ROWS = Rows((7, 7), (3, 4), (1, 2), (False, True), (0, 0))


def batch_of_two():
    requests = [Request(7, 14, (5, 6), seed=1), Request(7, 15, (5, 6), seed=2)]
    return build_batch(requests, [[8], [8, 9]], [[-0.5], [-0.25, -1.0]], truncated=[False, True], weight_version=3)


def test_columns_are_the_optional_fields():
    assert COLUMNS == (
        "temperature", "score", "baseline", "logp_old", "logp_ref", "values", "advantages", "returns",
    )  # fmt: skip


def test_replace_leaves_the_original_alone():
    first = RemoteBatch("batch", ROWS)
    second = first.replace(logp_ref=RemoteColumn("ref"))
    assert first.columns == {} and second.columns == {"logp_ref": RemoteColumn("ref")}
    assert second.rows is ROWS and len(second) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.ref = "other"


def test_a_later_column_takes_the_place_of_an_earlier_one():
    batch = RemoteBatch("batch", ROWS).replace(values=RemoteColumn("old")).replace(values=RemoteColumn("new"))
    assert batch.arguments() == ("batch", (("values", None),), "new")


def test_worker_joins_what_the_driver_only_names():
    score_B, logp_BT, advantage_BT = torch.tensor([1.0, 0.0]), torch.full((2, 4), -2.0), torch.ones(2, 4)
    remote = RemoteBatch("batch", ROWS).replace(
        score=score_B, logp_ref=RemoteColumn("ref"), advantages=RemoteColumn("estimate", "advantages")
    )
    objects = {"batch": batch_of_two(), "ref": logp_BT, "estimate": {"advantages": advantage_BT, "returns": None}}
    resolved = [objects[a] if isinstance(a, str) else a for a in remote.arguments()]
    batch = joined(*resolved)
    assert batch.score is score_B and batch.logp_ref is logp_BT and batch.advantages is advantage_BT
    assert batch.returns is None
    assert batch.tokens.tolist() == [[5, 6, 8, 0], [5, 6, 8, 9]]


def test_a_per_token_tensor_must_not_pass_through_the_driver():
    with pytest.raises(TypeError, match=r"'logp_ref' is a tensor of shape \(2, 4\) on the driver"):
        RemoteBatch("batch", ROWS).replace(logp_ref=torch.zeros(2, 4))


def test_unknown_column():
    with pytest.raises(TypeError, match="'tokens' is not a column; columns are temperature, score, baseline, logp_old"):
        RemoteBatch("batch", ROWS).replace(tokens=RemoteColumn("x"))


def test_rows_join_in_order():
    other = Rows((8,), (5,), (3,), (False,), (1,))
    assert Rows.cat([ROWS, other]) == Rows((7, 7, 8), (3, 4, 5), (1, 2, 3), (False, True, False), (0, 0, 1))
