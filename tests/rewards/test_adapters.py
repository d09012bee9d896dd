"""Reward functions in the conventions of verl and OpenRLHF."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.adapters import adapt
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy

# verl's columns as its preprocessing scripts write them.
VERL = (
    {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 7}},
    {"data_source": "math", "reward_model": {"style": "rule", "ground_truth": "9"}, "extra_info": None},
)


def score(function, columns, adapter="auto", on_failure="raise", args=None):
    policy = FailurePolicy(on_failure)
    rewards = RewardSet([RewardFunction("f", adapt(function, adapter, args or {}), policy=policy)])
    return rewards.score(["2+2=", "3*3="], ["4", "8"], [[4], [8]], columns)


def test_verl_row_by_row():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": float(solution_str == ground_truth), "acc": True}

    assert score(compute_score, VERL).total == [1.0, 0.0]
    assert seen == [("gsm8k", "4", "4", {"index": 7}), ("math", "8", "9", {})]


def test_verl_with_arguments_of_its_own_and_fewer_parameters():
    def compute_score(solution_str, ground_truth, bonus=0.0):
        return float(solution_str == ground_truth) + bonus

    assert score(compute_score, VERL, args={"bonus": 0.5}).total == [1.5, 0.5]
    assert score(compute_score, ({"answer": "4"}, {"ground_truth": "8"})).total == [1.0, 1.0], "other names"


def test_verls_own_gsm8k_function():
    """By its file, as a config names it: importing all of verl takes seconds."""
    verl = importlib.util.find_spec("verl")
    if verl is None:
        pytest.skip("verl is not installed")
    file = Path(verl.origin).parent / "utils" / "reward_score" / "gsm8k.py"
    rewards = RewardSet([load_reward(f"{file}:compute_score", args={"method": "flexible"})])
    texts = ["so it is #### 18", "so it is 17"]
    assert rewards.score(["q", "q"], texts, [[], []], [{"answer": "18"}] * 2).total == [1.0, 0.0]


def test_verl_batch_form_and_async_form():
    def compute_score(data_sources, solution_strs, ground_truths, extra_infos):
        assert data_sources == ["gsm8k", "math"] and extra_infos == [{"index": 7}, {}]
        return [{"score": 2.0}, float(solution_strs[1] == ground_truths[1])]

    assert score(compute_score, VERL).total == [2.0, 0.0]

    async def later(data_source, solution_str, ground_truth, extra_info):
        await asyncio.sleep(0)
        return int(solution_str) / int(ground_truth)

    assert score(later, VERL).total == pytest.approx([1.0, 8 / 9])


@pytest.mark.parametrize("is_async", [False, True])
def test_a_row_of_verl_that_raises_fails_alone(is_async):
    def now(data_source, solution_str, ground_truth, extra_info):
        return 1 / (int(solution_str) - 8)

    async def later(data_source, solution_str, ground_truth, extra_info):
        return now(data_source, solution_str, ground_truth, extra_info)

    function = later if is_async else now
    rewards = score(function, VERL, on_failure="drop_group")
    assert rewards.keep == [True, False] and rewards.total[0] == -0.25
    with pytest.raises(RewardError, match="raised ZeroDivisionError"):
        score(function, VERL)


@pytest.mark.parametrize(
    "shape",
    [
        lambda rewards: rewards,
        lambda rewards: rewards[:, None],
        lambda rewards: rewards.tolist(),
        lambda rewards: {"rewards": rewards, "scores": rewards, "extra_logs": {"x": rewards}},
    ],
)
def test_openrlhf(shape):
    def reward_func(queries, prompts, labels, **kwargs):
        assert queries == ["2+2=4", "3*3=8"] and prompts == ["2+2=", "3*3="]
        return shape(torch.tensor([float(q.endswith(f"={label}")) for q, label in zip(queries, labels, strict=True)]))

    assert score(reward_func, ({"label": "4"}, {"label": "9"})).total == [1.0, 0.0]
    assert score(reward_func, ({"answer": "5"}, {"answer": "8"})).total == [0.0, 1.0]


def test_openrlhf_async_and_without_labels():
    async def reward_func(queries, prompts, labels):
        assert labels == [None, None]
        return [1.0, 2.0]

    assert score(reward_func, ({}, {})).total == [1.0, 2.0]
    with pytest.raises(RewardError, match="returned a NoneType"):
        score(lambda queries, prompts, labels: {"scores": [1.0]}, ({}, {}))


def test_a_trl_function_that_also_takes_queries_stays_one_and_the_config_may_say_so():
    assert score(lambda completions, queries=None: [1.0, 2.0], ({}, {})).total == [1.0, 2.0]

    def odd(solution_str=None, **given):
        return [float(text == "4") for text in given["completions"]]

    assert score(odd, ({}, {}), adapter="trl").total == [1.0, 0.0]
