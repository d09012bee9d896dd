"""Code judged by its tests: every way to write tests, every hostile sample a failed test, and the run goes on."""

from __future__ import annotations

import json
import os

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.code_tests import UnitTest, code_in, code_tests, joined, read_tests
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sandbox")]

ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"

HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "memory hog": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "deletes files": "import shutil, os\nfor path in (VICTIM, os.path.dirname(os.__file__)): shutil.rmtree(path)",
    "leaves early": "import os; os._exit(0)",
    "leaves early, politely": "import sys; sys.exit(0)",
    "reads the environment": "import os\nprint(os.environ['API_TOKEN'])",
    "opens a socket": "import socket\nsocket.socket()",
}


def score(completions, tests, **args):
    given = {"completions": completions, "prompts": [""] * len(completions), "tests": tests}
    return list(code_tests(**given, **args).values)


def test_hostile_samples_fail_and_their_neighbours_are_judged(tier, tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    (tmp_path / "victim.txt").write_text("kept")
    os.chmod(tmp_path, 0o777)
    samples = [f"VICTIM = {str(tmp_path)!r}\n{harm}\n{ADD}" for harm in HOSTILE.values()]
    rows = len(samples) + 2
    rewards = RewardSet([load_reward("code", args={"seconds": 1.0, "tier": tier, "memory_mb": 256})]).score(
        [""] * rows, [ADD, *samples, ADD], [[]] * rows, [{"tests": TEST}] * rows
    )
    verdicts = dict(zip(["before", *HOSTILE, "after"], rewards.total, strict=True))
    assert verdicts == {"before": 1.0, **dict.fromkeys(HOSTILE, 0.0), "after": 1.0}
    assert (tmp_path / "victim.txt").read_text() == "kept" and os.path.isfile(os.__file__)


def test_ways_to_write_tests(tier):
    echo = "name = input()\nprint('hello', name)"
    pairs = [{"input": "you\n", "output": "hello you\n"}, {"input": "me", "output": "hello me"}]
    assert score(
        [ADD, ADD, ADD, echo, echo, echo, f"Here it is:\n```python\n{ADD}```\nDone."],
        [TEST, [TEST, "assert add(0, 0) == 0"], json.dumps([TEST, "assert add(1, 1) == 3"]), pairs, json.dumps(pairs),
         {"inputs": ["you"], "outputs": ["goodbye you"]}, TEST], tier=tier,
    ) == [1, 1, 0, 1, 1, 0, 1]  # fmt: skip


def test_partial_credit_and_the_prompt_as_a_beginning(tier):
    tests = [TEST, "assert add(1, 1) == 3", "assert add(2, 2) == 4", "1 / 0"]
    assert score([ADD], [tests], tier=tier) == [0.0] and score([ADD], [tests], tier=tier, partial=True) == [0.5]
    body = code_tests(["    return a + b\n"], ["def add(a, b):\n"], tests=[TEST], with_prompt=True, tier=tier)
    assert body.values == (1.0,)


def test_broken_tests_in_the_data_are_failures_of_their_row():
    for broken in (None, "", [], "[]", [{"input": "1"}], [3]):
        with pytest.raises(ValueError):
            read_tests(broken)
    outcome = code_tests(["x", "x"], ["", ""], tests=[None, []])
    assert outcome.values == (None, None) and "there are none" in outcome.failures[1].what
    kept = RewardSet([load_reward("code", policy=FailurePolicy("default", default_score=-1.0))])
    assert kept.score(["a"], ["x"], [[1]], [{"tests": ""}]).total == [-1.0]
    with pytest.raises(ConfigError, match="no column 'tests', only answer"):
        code_tests(["x"], [""], answer=["1"])


def test_the_code_in_a_completion():
    assert code_in("a = 1") == "a = 1"
    assert code_in("First\n```python\na = 1\n```\nbetter\n```py\na = 2\n```") == "a = 2\n"
    assert code_in("```\na = 3\n") == "a = 3\n", "cut off before the fence was closed"


def test_tests_by_code_share_a_process():
    pair = UnitTest(stdin="1", stdout="1")
    assert joined([UnitTest("a"), pair, UnitTest("b")]) == [UnitTest("a\nb"), pair]
