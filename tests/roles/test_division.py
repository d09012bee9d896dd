import pytest

from rlhf_ray.roles.division import split_microbatches, split_minibatches, split_ranks

PROMPTS = [7, 7, 3, 3, 9, 9, 5, 5]


def test_minibatches_keep_groups_whole_and_cover_every_row_once():
    parts = split_minibatches(PROMPTS, 2, seed=0)
    assert [len(part) for part in parts] == [4, 4]
    assert sorted(parts[0] + parts[1]) == list(range(8))
    for part in parts:
        assert {row ^ 1 for row in part} == set(part), "rows 2k and 2k+1 are a group"


def test_one_minibatch_is_everything_by_prompt():
    assert split_minibatches(PROMPTS, 1, seed=0) == [[2, 3, 6, 7, 0, 1, 4, 5]]


def test_minibatches_are_a_function_of_the_ids_and_the_seed():
    assert split_minibatches(PROMPTS, 4, 0) == split_minibatches(PROMPTS, 4, 0)
    shuffles = {tuple(map(tuple, split_minibatches(PROMPTS, 4, seed))) for seed in range(10)}
    assert len(shuffles) > 3
    later = {tuple(part[0] for part in split_minibatches([p + k for p in PROMPTS], 4, 0)) for k in range(10)}
    assert len(later) > 3, "another step, another shuffle"


def test_groups_that_are_not_side_by_side():
    assert split_minibatches([1, 2, 1, 2], 1, 0) == [[0, 2, 1, 3]]


def test_groups_that_do_not_divide():
    parts = split_minibatches(PROMPTS, 3, 0)
    assert sorted(len({PROMPTS[row] for row in part}) for part in parts) == [1, 1, 2]
    assert len(split_minibatches(PROMPTS, 9, 0)) == 4, "none is empty"


LENGTHS = [9, 1, 4, 4, 2, 7, 3, 6]


def test_the_longest_row_goes_to_the_lightest_rank():
    # 9 | 7 ; 6 -> rank 1 (13) ; 4 -> rank 0 (13) ; 4 -> rank 0 (17) ; 3 -> rank 1 (16) ; 2 -> rank 1 (18) ; 1 -> 0
    assert split_ranks(range(8), LENGTHS, 2) == [[0, 2, 3, 1], [5, 7, 6, 4]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_every_row_once_and_about_equally(world_size):
    shares = split_ranks(range(8), LENGTHS, world_size)
    assert sorted(row for share in shares for row in share) == list(range(8))
    loads = [sum(LENGTHS[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(LENGTHS)


def test_more_ranks_than_rows():
    assert split_ranks([0, 1], LENGTHS, 3) == [[0], [1], []]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_minibatches_do_not_depend_on_the_number_of_ranks(world_size):
    for part in split_minibatches(PROMPTS, 2, seed=0):
        shares = split_ranks(part, LENGTHS, world_size)
        assert sorted(row for share in shares for row in share) == sorted(part)


def test_microbatches_are_sorted_by_length_and_padded_within_the_budget():
    # width 9: one row fills 9 of 12; 7: one; 6: two (12); 4: three (12); 2 and 1 fit with it? no: 4 x 4 = 16
    assert split_microbatches(range(8), LENGTHS, 12) == [[0], [5], [7, 2], [3, 6, 4], [1]]


@pytest.mark.parametrize("budget", [1, 8, 12, 20, 100])
def test_microbatches_stay_within_the_budget(budget):
    parts = split_microbatches(range(8), LENGTHS, budget)
    assert sorted(row for part in parts for row in part) == list(range(8))
    for part in parts:
        assert len(part) == 1 or len(part) * max(LENGTHS[row] for row in part) <= budget


def test_a_row_longer_than_the_budget_goes_alone():
    assert split_microbatches([0, 1], [9, 1], 4) == [[0], [1]]
    assert split_microbatches([], LENGTHS, 4) == []
