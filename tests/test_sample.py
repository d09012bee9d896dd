"""A Sample: what the policy wrote of it, worked by hand."""

import numpy as np
import pytest

from rlhf_ray.roles.batch import batch_of
from rlhf_ray.sample import GIVEN, Sample


def two_turns() -> Sample:
    """Prompt 5 6; the policy writes 7 8; an environment says 9; the policy writes 1 under newer weights."""
    return Sample(
        prompt_id=3, sample_id=12, tokens=np.array([5, 6, 7, 8, 9, 1], np.int32), spans=((2, 4), (5, 6)),
        logprobs=np.array([-0.5, -1.0, -0.25], np.float32), versions=np.array([4, 4, 5], np.int32), ended="stop",
    )  # fmt: skip


def test_an_answer():
    sample = Sample.answer(1, 2, (5, 6), [7, 8], [-0.5, -1.0], 4, "length")
    assert sample.tokens.tolist() == [5, 6, 7, 8] and sample.spans == ((2, 4),)
    assert sample.versions.tolist() == [4, 4] and sample.written == 2 and len(sample) == 4
    assert sample.truncated and not Sample.answer(1, 2, (5,), [1], [-0.5], 4, "stop").truncated
    assert (sample.tokens.dtype, sample.logprobs.dtype, sample.versions.dtype) == (np.int32, np.float32, np.int32)


def test_tokens_of_one_answer_may_come_from_several_weights():
    assert Sample.answer(0, 0, (5,), [7, 1], [-0.5, -1.0], [3, 4], "stop").versions.tolist() == [3, 4]


@pytest.mark.parametrize(("logprobs", "versions"), [([-0.5], [1, 1]), ([-0.5, -1.0], [1])])
def test_each_written_token_is_described(logprobs, versions):
    with pytest.raises(ValueError, match="sample 7 has 2 written tokens"):
        Sample.answer(0, 7, (5,), [7, 1], logprobs, versions, "stop")


def test_rows_of_a_batch():
    given = Sample.answer(3, 13, (5, 6), [8], [0.0], GIVEN, "length")
    batch = batch_of([two_turns(), given], [{"a": 1}, {"a": 2}], [None, None], pad_token_id=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1], [5, 6, 8, 2, 2, 2]]
    assert batch.attention_mask.sum(1).tolist() == [6, 3]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]]
    assert batch.logp_gen.tolist() == [[0, 0, -0.5, -1.0, 0, -0.25], [0] * 6]
    assert batch.weight_version.tolist() == [[-1, -1, 4, 4, -1, 5], [-1] * 6]
    assert batch.rows.weight_version.tolist() == [4, -1] and batch.rows.response_lengths.tolist() == [3, 1]
    assert batch.truncated.tolist() == [False, True] and batch.sample_id.tolist() == [12, 13]
    assert batch.columns == ({"a": 1}, {"a": 2})
