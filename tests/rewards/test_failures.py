"""Every way in which a reward function can fail, under every policy, from a file, from a module and over HTTP."""

from __future__ import annotations

import threading

import pytest

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards import compose
from rlhf_ray.rewards.calling import RewardFunction
from rlhf_ray.rewards.compose import RewardSet, load_reward, reward_of
from rlhf_ray.rewards.failures import Failure, FailurePolicy, Outcome, join
from rlhf_ray.rewards.server import RewardServer

# The first row of the second prompt says what goes wrong; what it does is done once a file `mended` exists.
FUNCTION = """
import ctypes, math, os, sys, time

MENDED = {mended!r}

def reward(prompts, completions, mode, **columns):
    scores = [float(len(text)) for text in completions]
    if os.path.exists(MENDED):
        return scores
    bad = [row for row, what in enumerate(mode) if what]
    if not bad:
        return scores
    what, row = mode[bad[0]], bad[0]
    if any(columns["once"]):
        open(MENDED, "w").close()
    if what == "raises": raise KeyError("boom")
    if what == "hangs": time.sleep(600)
    if what == "exits": os._exit(0)
    if what == "leaves": sys.exit(0)
    if what == "crashes": ctypes.string_at(0)
    if what == "too few": return scores[:-1]
    if what == "too many": return scores + [1.0]
    if what == "a number": return 1.0
    if what == "nothing": return None
    scores[row] = {{"dict": {{}}, "nan": math.nan, "inf": math.inf, "text": "2.5", "list": [1.0]}}[what]
    return scores
"""

WHOLE_CALL = {
    "raises": "raised KeyError: 'boom'",
    "hangs": "did not return within 0.4 s",
    "exits": "ended with exit status 0",
    "leaves": "raised SystemExit: 0",
    "crashes": "died of SIGSEGV",
    "too few": "returned 3 scores for 4 completions",
    "too many": "returned 5 scores for 4 completions",
    "a number": "returned a float",
    "nothing": "returned a NoneType",
}
ONE_ROW = {
    "dict": "gave a dict for row 2",
    "nan": "gave nan for row 2",
    "inf": "gave inf for row 2",
    "text": "gave the text '2.5' for row 2",
    "list": "gave a list for row 2",
}
MODES = {**WHOLE_CALL, **ONE_ROW}

pytestmark = pytest.mark.slow  # together, for they wait for what hangs

PROMPTS, TEXTS, IDS = ["a", "a", "b", "b"], ["x", "xx", "xxx", "xxxx"], [[1]] * 4


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(compose, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "failing_reward.py").write_text(FUNCTION.format(mended=str(folder / "mended")))
    return folder


@pytest.fixture(scope="module")
def function(place):
    """The function in its own process: one for all tests, so each also shows that it comes back."""
    loaded = load_reward(f"{place}/failing_reward.py:reward", isolated=True, timeout_s=0.4, name="mine")
    yield loaded
    loaded.close()


@pytest.fixture
def score(function, place):
    def run(mode: str, once: bool = False, source=function, **policy):
        (place / "mended").unlink(missing_ok=True)
        rewards = RewardSet([
            RewardFunction("mine", source.function, 2.0, policy=FailurePolicy(**policy)),
            RewardFunction("other", lambda completions: [100.0] * len(completions)),
        ])  # fmt: skip
        return rewards.score(PROMPTS, TEXTS, IDS, [{"mode": m, "once": once} for m in ("", "", mode, "")])

    return run


def test_nothing_fails(score):
    rewards = score("")
    assert rewards.total == [102.0, 104.0, 106.0, 108.0] and rewards.keep == [True] * 4 and rewards.events == []


@pytest.mark.parametrize("mode", MODES)
def test_raise(score, mode):
    with pytest.raises(RewardError, match=f"^reward 'mine' .*{MODES[mode]}"):
        score(mode)


@pytest.mark.parametrize("mode", MODES)
def test_retry_mends_what_was_a_mishap(score, mode):
    rewards = score(mode, once=True, on_failure="retry", retries=2)
    assert rewards.total == [102.0, 104.0, 106.0, 108.0] and rewards.keep == [True] * 4
    assert rewards.stats == {"fault/retries": 1.0, "fault/dropped": 0.0}
    assert [(event["action"], event["rows"], event["retries"]) for event in rewards.events] == [("retry", 0, 1)]


@pytest.mark.parametrize("mode", MODES)
def test_retry_ends_with_the_error(score, mode):
    with pytest.raises(RewardError, match=r"reward 'mine' .*\(asked 2 times\)"):
        score(mode, on_failure="retry", retries=1)


@pytest.mark.parametrize("mode", ONE_ROW)
def test_drop_group(score, mode):
    rewards = score(mode, on_failure="drop_group")
    assert rewards.keep == [True, True, False, False]
    assert rewards.total[:2] == [102.0, 104.0] and str(rewards.total[2]) == "nan"
    assert rewards.by_function["mine"][3] == 4.0 and rewards.by_function["other"] == [100.0] * 4
    assert rewards.stats == {"fault/retries": 0.0, "fault/dropped": 1.0}
    (event,) = rewards.events
    assert event["action"] == "drop_group" and event["rows"] == 1 and MODES[mode] in event["reason"]


@pytest.mark.parametrize("mode", WHOLE_CALL)
def test_drop_group_of_a_whole_call(score, mode):
    """Nothing is left: `loops/rollouts.py` ends the run, unless other rounds of the step have something to learn."""
    rewards = score(mode, on_failure="drop_group")
    assert rewards.keep == [False] * 4 and str(rewards.total) == "[nan, nan, nan, nan]"
    assert rewards.stats["fault/dropped"] == 2.0 and MODES[mode] in rewards.events[0]["reason"]


@pytest.mark.parametrize("mode", MODES)
def test_default(score, mode):
    rewards = score(mode, on_failure="default", default_score=-3.0)
    assert rewards.keep == [True] * 4
    lost = [2] if mode in ONE_ROW else [0, 1, 2, 3]
    assert rewards.total == [94.0 if row in lost else 100.0 + 2 * (row + 1) for row in range(4)]
    assert rewards.stats["fault/defaulted"] == len(lost)
    assert [(event["action"], event["rows"]) for event in rewards.events] == [("default", len(lost))]


@pytest.fixture(scope="module")
def imported(place):
    """The same function by its import path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        source = load_reward("failing_reward:reward", isolated=True, timeout_s=0.4)
        yield source
        source.close()


@pytest.mark.parametrize("mode", MODES)
def test_by_import_path(score, imported, mode):
    with pytest.raises(RewardError, match=MODES[mode]):
        score(mode, source=imported)
    assert score(mode, once=True, source=imported, on_failure="retry", retries=1).total[2] == 106.0
    assert score(mode, source=imported, on_failure="default", default_score=-3.0).total[2] == 94.0
    kept = [True, True, False, False] if mode in ONE_ROW else [False] * 4
    assert score(mode, source=imported, on_failure="drop_group").keep == kept


def test_only_the_failed_groups_are_asked_again():
    """Whole groups, because a function may compare the answers to one prompt with each other."""
    calls = []

    def picky(prompts, completions):
        calls.append(list(zip(prompts, completions, strict=True)))
        return [None if len(calls) == 1 and text == "xxx" else float(len(prompts)) for text in completions]

    rewards = RewardSet([RewardFunction("f", picky, policy=FailurePolicy("retry", 1))])
    assert rewards.score(PROMPTS, TEXTS, IDS, [{}] * 4).total == [4.0, 4.0, 2.0, 4.0], "others keep their first score"
    assert calls[1] == [("b", "xxx"), ("b", "xxxx")]


def test_groups_may_be_told_apart_although_their_prompts_are_equal():
    def one_fails(completions):
        return [None if text == "xxx" else 1.0 for text in completions]

    rewards = RewardSet([RewardFunction("f", one_fails, policy=FailurePolicy("drop_group"))])
    assert rewards.score(["p"] * 4, TEXTS, IDS, [{}] * 4, groups=[7, 8, 9, 8]).keep == [True, True, False, True]


def test_two_functions_two_policies():
    def first(completions):
        return ["?", 1.0, 1.0, 1.0]

    def second(completions):
        return [1.0, 1.0, 1.0, "?"]

    rewards = RewardSet([
        RewardFunction("first", first, 10.0, policy=FailurePolicy("default", default_score=0.5)),
        RewardFunction("second", second, 1.0, policy=FailurePolicy("drop_group")),
    ]).score(PROMPTS, TEXTS, IDS, [{}] * 4)  # fmt: skip
    assert rewards.total[:3] == [6.0, 11.0, 11.0] and rewards.keep == [True, True, False, False]
    assert [event["reward"] for event in rewards.events] == ["first", "second"]


def test_an_async_function_in_this_process_has_a_time_limit_too():
    import asyncio

    async def slow(completions):
        await asyncio.sleep(60)

    function = RewardFunction("slow", slow, timeout_s=0.1)
    with pytest.raises(RewardError, match=r"'slow' did not return within 0.1 s"):
        RewardSet([function]).score(PROMPTS, TEXTS, IDS, [{}] * 4)


def test_isolated_functions_run_side_by_side(tmp_path):
    """Each waits until all three have begun."""
    (tmp_path / "meet.py").write_text(
        "import os, pathlib, time\n"
        "def f(completions):\n"
        f"    here = pathlib.Path({str(tmp_path)!r})\n"
        "    (here / f'{os.getpid()}.begun').touch()\n"
        "    until = time.monotonic() + 60\n"
        "    while len(list(here.glob('*.begun'))) < 3 and time.monotonic() < until: time.sleep(0.01)\n"
        "    return [len(list(here.glob('*.begun')))] * len(completions)\n"
    )
    rewards = RewardSet([load_reward(f"{tmp_path}/meet.py:f", isolated=True) for _ in range(3)])
    assert rewards.score(PROMPTS, TEXTS, IDS, [{}] * 4).total == [9.0] * 4
    rewards.close()


# ---- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(function):
    """Two servers, by policy: one that raises says so to its client, one that drops tells it row by row."""
    servers = {
        name: RewardServer(RewardSet([RewardFunction("mine", function.function, policy=FailurePolicy(name))]))
        for name in ("raise", "drop_group")
    }
    threads = [threading.Thread(target=server.serve) for server in servers.values()]
    for thread in threads:
        thread.start()
    yield servers
    for server, thread in zip(servers.values(), threads, strict=True):
        server.close()
        thread.join()


@pytest.fixture
def score_by_http(server, place):
    def run(mode: str, once: bool = False, served="drop_group", **policy):
        (place / "mended").unlink(missing_ok=True)
        settings = {"name": "remote", "weight": 2.0, "timeout_s": 120.0}
        reward = load_reward(server[served].url, policy=FailurePolicy(**policy), **settings)
        columns = [{"mode": m, "once": once} for m in ("", "", mode, "")]
        return RewardSet([reward]).score(PROMPTS, TEXTS, IDS, columns)

    return run


@pytest.mark.parametrize("mode", MODES)
def test_over_http(score_by_http, mode):
    with pytest.raises(RewardError, match=f"reward 'remote' failed at http.* .reward 'mine' .*{MODES[mode]}"):
        score_by_http(mode)
    with pytest.raises(RewardError, match=f"reward 'remote' got HTTP 500 .*reward 'mine' .*{MODES[mode]}"):
        score_by_http(mode, served="raise")
    assert score_by_http(mode, once=True, on_failure="retry", retries=1).total == [2.0, 4.0, 6.0, 8.0]
    rewards = score_by_http(mode, on_failure="default", default_score=-1.0)
    assert rewards.total == ([2.0, 4.0, -2.0, 8.0] if mode in ONE_ROW else [-2.0] * 4)
    if mode in ONE_ROW:
        assert score_by_http(mode, on_failure="drop_group").keep == [True, True, False, False]


# ---- outcomes and settings ------------------------------------------------------------------------------------


def test_outcomes_join_and_travel():
    bad = Outcome((1.0, None), {1: Failure("gave nan", "return a number")}, retries=2)
    both = join([Outcome((5.0, None)), bad, Outcome.failed(1, "raised X", "mend it", where=("a.py:1 in f: x",))])
    assert both.values == (5.0, None, 1.0, None, None) and sorted(both.failures) == [3, 4] and both.retries == 2
    assert Outcome.from_json(both.as_json()) == both


def test_the_policy_of_a_config():
    reward = reward_of(RewardConfig(function="sentiment", on_failure="retry"))
    assert reward.policy == FailurePolicy("retry", 2) and reward.name == "sentiment"
    settings = {"on_failure": "default", "default_score": 0.0, "retries": 1, "weight": 3.0, "name": "mood"}
    reward = reward_of(RewardConfig(function="sentiment", **settings))
    assert reward.policy == FailurePolicy("default", 1, 0.0) and (reward.weight, reward.name) == (3.0, "mood")


def test_a_function_of_ones_own_is_isolated_unless_the_config_says_no(place):
    own = f"{place}/failing_reward.py:reward"
    isolated, here = reward_of(RewardConfig(function=own)), reward_of(RewardConfig(function=own, isolated=False))
    assert isolated.function.child.pid and not hasattr(here.function, "child")
    pid = isolated.function.child.pid
    isolated.close()
    assert isolated.function.child.pid is None and pid


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"on_failure": "default"}, "default_score, which is empty; set it"),
        ({"default_score": 1.0}, "default_score=1 would never be given, for rewards.0.on_failure=raise"),
        ({"on_failure": "retry", "retries": 0}, "never asks again"),
        ({"function": "http://host:1", "isolated": True}, "http://host:1 is a server; remove them"),
        ({"function": "http://host:1", "adapter": "verl"}, "http://host:1 is a server; remove them"),
        ({"token_env": "TOKEN"}, "token_env is for reward servers, and sentiment is a function"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    from rlhf_ray.config.reward_server import RewardServerConfig

    with pytest.raises(ConfigError, match=says):
        parse_config({"rewards": [{"function": "sentiment", **settings}]}, RewardServerConfig, source="x.yaml")
