from __future__ import annotations

import asyncio
import math
import os
import signal

import numpy
import pytest
import torch

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet, load_reward

PROMPTS, TEXTS, IDS = ["p1", "p2"], ["one", "three"], [[5], [6, 7, 8]]
COLUMNS = ({"prompt": "p1", "answer": "one"}, {"prompt": "p2", "answer": "two"})


def score(*functions, columns=COLUMNS):
    rewards = RewardSet(functions).score(PROMPTS, TEXTS, IDS, columns)
    assert rewards.keep == [True, True] and rewards.stats == {"fault/retries": 0, "fault/dropped": 0}
    assert rewards.events == []
    return rewards.total, rewards.by_function


def test_weighted_sum_by_hand():
    total, scores = score(
        load_reward("exact_answer", weight=2.0),
        load_reward("length_penalty", weight=0.5, args={"free_tokens": 1, "per_token": 1.0}),
    )
    assert scores == {"exact_answer": [1.0, 0.0], "length_penalty": [0.0, -2.0]}
    assert total == [2.0, -1.0]


def test_what_a_function_receives():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(locals())
        return [0, 0]

    score(RewardFunction("spy", spy), columns=(COLUMNS[0], {"prompt": "p2", "level": 3}))
    assert seen["prompts"] == PROMPTS and seen["completions"] == TEXTS and seen["completion_ids"] == IDS
    assert seen["columns"] == {"answer": ["one", None], "level": [None, 3]}


def test_a_function_may_take_only_what_it_needs():
    assert score(RewardFunction("f", lambda completions: [len(t) for t in completions]))[0] == [3.0, 5.0]


def test_tensors_arrays_and_bools_are_numbers():
    for value in (torch.tensor([1.0, 0.0]), numpy.array([True, False]), (True, numpy.float32(0.0))):
        assert score(RewardFunction("f", lambda completions, value=value: value))[0] == [1.0, 0.0]


def test_async_functions_run_side_by_side_also_inside_a_running_loop():
    running, most = [], []

    async def slow(completions, **_):
        running.append(1)
        await asyncio.sleep(0.05)
        most.append(len(running))
        running.pop()
        return [1.0, 2.0]

    functions = [RewardFunction("a", slow), RewardFunction("b", slow, weight=10.0)]
    total, scores = score(*functions)
    assert max(most) == 2
    assert total == [11.0, 22.0] and list(scores) == ["a", "b"]

    async def notebook():
        return score(*functions)

    assert asyncio.run(notebook())[0] == [11.0, 22.0]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, None], "gave None for row 1"),
        ([math.nan, 1.0], "gave nan for row 0"),
        ([1.0, math.inf], "gave inf for row 1"),
        ([1.0, "2"], "gave the text '2' for row 1"),
        ([1.0, [2.0]], "gave a list for row 1"),
        (3.0, "returned a float; it must return a list"),
        (None, "returned a NoneType"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_no_reward_is_refused_by_name_and_row(value, says, is_async):
    async def later(**_):
        return value

    function = later if is_async else lambda **_: value
    with pytest.raises(RewardError, match=rf"reward 'mine' {says}"):
        score(RewardFunction("mine", function))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_raises_is_named(is_async):
    def now(**_):
        raise KeyError("boom")

    async def later(**_):
        raise KeyError("boom")

    with pytest.raises(RewardError, match="reward 'mine' raised KeyError: 'boom'; mend the function") as caught:
        score(RewardFunction("mine", later if is_async else now))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_missing_column_is_explained():
    with pytest.raises(RewardError, match=r"'answer'.*the data gives it .*add the column"):
        score(load_reward("exact_answer"), columns=({}, {}))


def test_names_are_unique_and_may_be_chosen():
    functions = [load_reward("keyword", args={"keywords": [word]}) for word in ("one", "two", "three")]
    assert score(*functions)[1] == {"keyword": [1, 0], "keyword_2": [0, 0], "keyword_3": [0, 1]}
    assert load_reward("sentiment", name="mood").name == "mood"
    assert load_reward("json:dumps").name == "dumps"


def test_a_function_may_bring_its_own_event_loop():
    async def inner():
        return [1.0, 2.0]

    assert score(RewardFunction("f", lambda completions: asyncio.run(inner())))[0] == [1.0, 2.0]


def test_functions_of_a_file(tmp_path):
    for number in (1, 2):  # two files of the same name
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "reward.py").write_text(f"def f(completions, **_): return [{number}.0] * len(completions)\n")
    total, _ = score(*(load_reward(f"{tmp_path}/{n}/reward.py:f") for n in (1, 2)))
    assert total == [3.0, 3.0]


def test_what_cannot_be_loaded_is_explained(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    for function, says in [
        ("sentimnt", "did you mean 'sentiment'"),
        ("zzz", "the built-in ones are exact_answer, "),
        ("no.such.module:f", "cannot be imported .ModuleNotFoundError"),
        ("json:dump_all", "json has no 'dump_all'; did you mean 'dump'"),
        ("json:__doc__", "not a function"),
        (f"{tmp_path}/none.py:f", "does not exist"),
        (f"{broken}:f", "cannot be run .ZeroDivisionError"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_reward(function)
    with pytest.raises(ConfigError, match="args may not set .'completions'"):
        load_reward("sentiment", args={"completions": []})


@pytest.mark.parametrize("function, args, says", [
    ("length_penalty", {}, "needs 'free_tokens', which is not set; its args are free_tokens, per_token"),
    ("length_penalty", {"free_tokens": 1, "per_tokn": 2}, "has no setting 'per_tokn'; its args are free_tokens, per_"),
    ("sentiment", {"weight": 2}, "reward sentiment has no setting 'weight'; its args are none"),
])  # fmt: skip
def test_settings_of_a_builtin_reward_are_checked_when_it_is_loaded(function, args, says):
    with pytest.raises(ConfigError, match=says):
        load_reward(function, args=args)


def test_no_functions_means_zero():
    assert score() == ([0.0, 0.0], {})


def test_ctrl_c_where_a_loop_runs_as_in_a_notebook_ends_an_async_function():
    ended = []

    async def slow(completions):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def cell():
        score(RewardFunction("slow", slow))

    loop = asyncio.new_event_loop()  # asyncio.run would take the signal for itself
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
    finally:
        loop.close()
    assert ended == ["cancelled"]
