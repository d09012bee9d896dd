"""None means "not mine": the sum is over those that judged a row, and only a row that nobody judged is a failure."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager

import pytest

from rlhf_ray.errors import RewardError
from rlhf_ray.rewards import compose
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.rewards.server import RewardServer

# Two prompts with two answers each; what each judge says of them.
PROMPTS, TEXTS, IDS = ["a", "a", "b", "b"], ["w", "x", "y", "z"], [[1]] * 4
SUMS, PROOFS = [2.0, None, None, 0.5], [None, None, 3.0, 4.0]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(compose, "_FIRST_PAUSE_S", 0.001)


def judge(name, values, weight=1.0, **policy):
    table = dict(zip(TEXTS, values, strict=True))
    return RewardFunction(
        name, lambda completions: [table[text] for text in completions], weight, policy=FailurePolicy(**policy)
    )


def score(*functions, **settings):
    return RewardSet(functions).score(PROMPTS, TEXTS, IDS, [{}] * 4, **settings)


def with_none(values):
    return [None if math.isnan(value) else value for value in values]


@pytest.mark.parametrize("policy", ["raise", "retry", "drop_group"])
def test_the_sum_is_over_those_that_judged(policy):
    rewards = score(
        judge("sums", SUMS, 10.0, on_failure=policy),
        judge("proofs", PROOFS, 100.0, on_failure=policy),
        judge("short", [None, 7.0, None, None], on_failure=policy),
    )
    assert rewards.total == [20.0, 7.0, 300.0, 405.0]
    assert with_none(rewards.by_function["sums"]) == SUMS and with_none(rewards.by_function["proofs"]) == PROOFS
    assert rewards.keep == [True] * 4 and rewards.events == []
    assert rewards.stats == {"fault/retries": 0.0, "fault/dropped": 0.0}


def test_a_row_that_nobody_judged_ends_the_run_and_everybody_is_named():
    with pytest.raises(
        RewardError, match=r"'sums' gave None for row 1; so nobody judged it, as did every other .*\(sums, proofs\)"
    ):
        score(judge("sums", SUMS), judge("proofs", PROOFS))
    with pytest.raises(RewardError, match="^reward 'sums' gave None for row 1; so nobody judged it: return a number"):
        score(judge("sums", SUMS))


def test_a_row_that_nobody_judged_loses_its_group():
    rewards = score(judge("sums", SUMS, on_failure="drop_group"), judge("proofs", PROOFS, on_failure="drop_group"))
    assert rewards.keep == [False, False, True, True] and rewards.total[2:] == [3.0, 4.5]
    assert rewards.stats["fault/dropped"] == 1.0
    assert [(event["reward"], event["rows"]) for event in rewards.events] == [("sums", 1), ("proofs", 1)]


def test_the_strictest_policy_of_those_that_passed_a_row_on_decides():
    lenient = {"on_failure": "default", "default_score": -1.0}
    rewards = score(judge("sums", SUMS, 2.0, **lenient), judge("proofs", PROOFS, **lenient))
    assert rewards.total == [4.0, -3.0, 3.0, 5.0], "row 1: both defaults, each with its weight"
    assert rewards.stats["fault/defaulted"] == 2.0
    rewards = score(judge("sums", SUMS, **lenient), judge("proofs", PROOFS, on_failure="drop_group"))
    assert rewards.keep == [False, False, True, True]
    with pytest.raises(RewardError, match="'proofs' gave None for row 1"):
        score(judge("sums", SUMS, **lenient), judge("proofs", PROOFS))


def test_a_failure_is_not_hidden_by_a_judge_that_passes_the_row_on():
    """The function that failed was asked for a number; that another one has none to give changes nothing."""
    broken = [1.0, math.nan, 1.0, 1.0]
    with pytest.raises(RewardError, match="'broken' gave nan for row 1"):
        score(judge("broken", broken), judge("other", [None] * 4))
    rewards = score(judge("broken", broken, on_failure="drop_group"), judge("other", [5.0] * 4))
    assert rewards.keep == [False, False, True, True], "a score of somebody else does not make up for it"


def test_none_is_asked_again_only_where_nobody_judged():
    calls = {"first": [], "second": []}

    def first(completions):
        calls["first"].append(list(completions))
        return [1.0 if text in "wx" else None for text in completions]

    def second(completions):
        calls["second"].append(list(completions))
        return [3.0 if text == "y" or (text == "z" and len(calls["second"]) > 1) else None for text in completions]

    again = FailurePolicy("retry", 2)
    rewards = score(RewardFunction("first", first, policy=again), RewardFunction("second", second, policy=again))
    assert rewards.total == [1.0, 1.0, 3.0, 3.0]
    # Row z: nobody at first. Its whole group is asked again, by both, and once is enough.
    assert calls == {"first": [TEXTS, ["y", "z"]], "second": [TEXTS, ["y", "z"]]}


def test_one_that_is_not_asked_again_does_not_fail_when_another_one_answers():
    asked = []

    def late(completions):
        asked.append(1)
        return [None if len(asked) == 1 else 1.0 for _ in completions]

    rewards = score(
        RewardFunction("late", late, policy=FailurePolicy("retry", 1)), judge("never", [None] * 4)
    )
    assert rewards.total == [1.0] * 4 and [event["action"] for event in rewards.events] == ["retry"]


def test_where_something_else_scores_every_row_none_is_no_failure():
    rewards = score(judge("sums", SUMS, 10.0), others_judge=True)
    assert rewards.total == [20.0, 0.0, 0.0, 5.0] and rewards.keep == [True] * 4 and rewards.events == []


@pytest.mark.slow
def test_none_out_of_a_process_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def even(completions, n): return [1.0 if k % 2 == 0 else None for k in n]\n"
        "async def odd(completions, n): return [2.0 if k % 2 else None for k in n]\n"
    )
    functions = [load_reward(f"{tmp_path}/mine.py:{name}", isolated=True) for name in ("even", "odd")]
    rewards = RewardSet(functions)
    found = rewards.score(PROMPTS, TEXTS, IDS, [{"n": n} for n in range(4)])
    rewards.close()
    assert found.total == [1.0, 2.0, 1.0, 2.0]


# ---- other conventions, and HTTP ------------------------------------------------------------------------------


def test_none_in_the_conventions_of_verl_and_openrlhf(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "def row(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': 1.0} if data_source == 'gsm8k' else None\n"
        "def rows(data_sources, solution_strs, ground_truths, extra_infos):\n"
        "    return [{'score': None} if s == 'gsm8k' else 2.0 for s in data_sources]\n"
        "def forgetful(data_source, solution_str, ground_truth, extra_info): return {'acc': 1.0}\n"
        "def labelled(queries, prompts, labels): return {'rewards': [None if q == 'pq' else 3.0 for q in queries]}\n"
    )
    columns = [{"data_source": "gsm8k"}, {"data_source": "code"}]
    named = {name: load_reward(f"{tmp_path}/theirs.py:{name}") for name in ("row", "rows", "forgetful", "labelled")}

    def total(*names):
        return RewardSet([named[name] for name in names]).score(["p", "p"], ["q", "r"], [[1]] * 2, columns).total

    assert total("row", "rows") == [1.0, 2.0] and total("row", "labelled") == [1.0, 3.0]
    with pytest.raises(RewardError, match="'forgetful' gave a dict"):
        total("row", "rows", "forgetful")


@contextmanager
def serving(*functions):
    server = RewardServer(RewardSet(functions))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield load_reward(server.url, name="remote", policy=FailurePolicy("drop_group"))
    finally:
        server.close()
        thread.join()


def test_over_http_null_is_none_unless_the_server_says_that_it_failed():
    broken = judge("broken", [1.0, None, math.nan, None], on_failure="drop_group")
    with serving(broken) as remote:
        rewards = score(remote, judge("here", [None, 5.0, 6.0, 7.0]))
    assert rewards.total[:2] == [1.0, 5.0], "row 1: null, so judged here"
    assert rewards.keep == [True, True, False, False]
    (event,) = rewards.events
    assert "failed at http" in event["reason"] and "reward 'broken' gave nan for row 2" in event["reason"]
    with serving(judge("nobody", [None] * 4)) as remote:
        assert score(remote, judge("here", [1.0] * 4)).total == [1.0] * 4
        assert score(remote).keep == [False] * 4
