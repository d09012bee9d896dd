"""The Batch: two ragged rows, worked by hand."""

import dataclasses

import pytest
import torch

from rlhf_ray.roles.batch import Batch, Rows, build_batch, pad_columns
from rlhf_ray.roles.protocols import Request


@pytest.fixture
def batch() -> Batch:
    """Row 0: prompt 5 6, completion 7 1 (EOS). Row 1: prompt 5, completion 8, cut by the limit."""
    requests = [
        Request(prompt_id=4, sample_id=8, token_ids=(5, 6), seed=0, columns={"answer": "a"}),
        Request(prompt_id=9, sample_id=18, token_ids=(5,), seed=0, columns={"answer": "b"}),
    ]
    return build_batch(
        requests, [[7, 1], [8]], [[-0.5, -0.25], [-2.0]], truncated=[False, True], weight_version=3, pad_token_id=2
    )


def test_two_ragged_rows(batch):
    assert batch.tokens.tolist() == [[5, 6, 7, 1], [5, 8, 2, 2]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.logp_gen.tolist() == [[0, 0, -0.5, -0.25], [0, -2.0, 0, 0]]
    assert batch.weight_version.tolist() == [[-1, -1, 3, 3], [-1, 3, -1, -1]], "only sampled tokens have a version"
    assert batch.prompt_id.tolist() == [4, 9] and batch.sample_id.tolist() == [8, 18]
    assert batch.truncated.tolist() == [False, True]
    assert batch.columns == ({"answer": "a"}, {"answer": "b"})
    assert len(batch) == 2 and batch.lengths.tolist() == [4, 2]
    assert batch.score is None and batch.values is None


def test_types(batch):
    kinds = {name: getattr(batch, name).dtype for name in ("tokens", "logp_gen", "weight_version", "prompt_id")}
    assert kinds == {
        "tokens": torch.int64, "logp_gen": torch.float32, "weight_version": torch.int32, "prompt_id": torch.int64,
    }  # fmt: skip
    assert {batch.attention_mask.dtype, batch.response_mask.dtype, batch.truncated.dtype} == {torch.bool}


@pytest.mark.parametrize(
    ("completions", "logprobs"), [([[7, 1]], [[-0.5, -0.25], [-2.0]]), ([[7, 1], [8]], [[-0.5, -0.25]])]
)
def test_a_generator_that_returns_too_little_is_noticed(completions, logprobs):
    requests = [Request(0, 0, (5, 6), 0), Request(1, 1, (5,), 0)]
    with pytest.raises(ValueError, match="zip"):
        build_batch(requests, completions, logprobs, truncated=[False, False], weight_version=0)


def test_rows_tell_a_driver_all_it_needs(batch):
    mixed = batch.replace(weight_version=torch.tensor([[-1, -1, 4, 2], [-1, 3, -1, -1]], dtype=torch.int32))
    assert mixed.rows == Rows(
        prompt_id=(4, 9), lengths=(4, 2), response_lengths=(2, 1), truncated=(False, True), weight_version=(2, 3),
        prompt_lengths=(2, 1), prompt_digests=batch.rows.prompt_digests,
    )  # fmt: skip
    first, second = mixed.rows.prompt_digests
    swapped = batch.select([1, 0]).rows.prompt_digests.tolist()
    assert first != second and swapped == [second, first], "of the prompt's tokens"
    assert len(mixed.rows) == 2


def test_rows_tell_which_log_probabilities_are_numbers(batch):
    assert batch.rows.finite.tolist() == [True, True]
    broken = batch.logp_gen.clone()
    broken[1, batch.response_mask[1]] = float("-inf")
    broken[0, ~batch.response_mask[0]] = float("nan")  # nobody's
    assert batch.replace(logp_gen=broken).rows.finite.tolist() == [True, False]
    assert Rows((3,), (2,), (1,), (False,), (0,), (1,), (5,)).finite.tolist() == [True]


def test_an_empty_completion_has_no_version():
    empty = build_batch([Request(0, 0, (5,), 0)], [[]], [[]], truncated=[False], weight_version=7)
    assert empty.rows.weight_version.tolist() == [-1] and empty.rows.response_lengths.tolist() == [0]


def test_select_takes_rows_in_order_and_trims(batch):
    short = batch.select([1])
    assert short.tokens.tolist() == [[5, 8]] and short.weight_version.tolist() == [[-1, 3]]
    assert short.columns == ({"answer": "b"},) and short.sample_id.tolist() == [18]
    assert batch.select([1], trim=False).tokens.tolist() == [[5, 8, 2, 2]]
    twice = batch.select([1, 0, 1])
    assert twice.prompt_id.tolist() == [9, 4, 9] and twice.tokens.shape == (3, 4)


def test_select_takes_a_mask(batch):
    assert batch.select(torch.tensor([False, True])).prompt_id.tolist() == [9]
    assert batch.select(torch.tensor([True, True])).prompt_id.tolist() == [4, 9]


def test_select_takes_optional_columns_along(batch):
    scored = batch.replace(score=torch.tensor([1.0, 2.0]), values=torch.arange(8.0).view(2, 4))
    picked = scored.select([1])
    assert picked.score.tolist() == [2.0] and picked.values.tolist() == [[4.0, 5.0]] and picked.returns is None


def test_cat_pads_to_the_widest(batch):
    joined = Batch.cat([batch.select([1]), batch.select([0])])
    assert joined.tokens.tolist() == [[5, 8, 0, 0], [5, 6, 7, 1]]
    assert joined.weight_version.tolist() == [[-1, 3, -1, -1], [-1, -1, 3, 3]], "0 would be a real version"
    assert joined.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert joined.columns == ({"answer": "b"}, {"answer": "a"})


def test_cat_of_the_parts_is_the_whole(batch):
    whole = batch.replace(tokens=batch.tokens * batch.attention_mask, score=torch.tensor([1.0, 2.0]))
    joined = Batch.cat([whole.select([0]), whole.select([1])])
    for field in dataclasses.fields(Batch):
        mine, theirs = getattr(whole, field.name), getattr(joined, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def test_cat_refuses_parts_that_differ(batch):
    scored = batch.replace(score=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="some parts have 'score'"):
        Batch.cat([scored, batch])


def test_replace_leaves_the_original(batch):
    changed = batch.replace(score=torch.tensor([1.0, 2.0]))
    assert batch.score is None and changed.score.tolist() == [1.0, 2.0] and changed.tokens is batch.tokens
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.score = torch.zeros(2)
    with pytest.raises(TypeError, match="scores"):
        batch.replace(scores=torch.zeros(2))


def test_pad_columns():
    assert pad_columns(torch.tensor([[1.0, 2.0]]), 3).tolist() == [[1.0, 2.0, 0.0]]
    assert pad_columns(torch.tensor([[1, 2]]), 3, "weight_version").tolist() == [[1, 2, -1]]
    assert pad_columns(torch.tensor([1, 2]), 3).tolist() == [1, 2], "[B] has no columns"
