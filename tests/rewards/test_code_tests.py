"""Code judged by its tests: every kind of test, every hostile sample a failed test, and the run goes on."""

from __future__ import annotations

import json
import os

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.code_tests import code_in, code_tests
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


def score(completions, tests, prompts=None, **args):
    given = {"completions": completions, "prompts": prompts or [""] * len(completions), "tests": tests}
    outcome = code_tests(**given, **args)
    assert not outcome.failures
    return list(outcome.values)


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


METHOD = "class Solution:\n    def add(self, a: List[int], b) -> int:\n        return a + b\n"
CALLS = {"fn_name": "add", "inputs": [[4, 6], ["x", "y"], [[1], [2]]], "outputs": [10, "xy", [1, 2]]}


def test_calls_of_a_function_and_of_a_solution_class(tier):
    wrong = {**CALLS, "outputs": [10, "xy", [1, 3]]}
    tuples = "def add(a, b):\n    return (a, b)"
    assert score(
        [ADD, METHOD, METHOD, ADD, METHOD.replace("add", "plus"), tuples, "add = lambda *, a, b: a + b"],
        [CALLS, CALLS, json.dumps(CALLS), wrong, CALLS, {"fn_name": "add", "inputs": [[1, [2]]], "outputs": [[1, [2]]]},
         {"fn_name": "add", "inputs": [{"a": 4, "b": 6}], "outputs": [10]}], tier=tier,
    ) == [1, 1, 1, 0, 0, 1, 1]  # fmt: skip


def test_calls_as_livecodebench_writes_them(tier):
    public = [{"input": "[4, 5]\n6", "output": "[4, 5, 6]", "testtype": "functional"}]
    sample = "class Solution:\n    def join(self, a: List[int], b: int) -> List[int]:\n        return a + [b]\n"
    given = {"tests": [json.dumps(public)], "tier": tier}
    named = code_tests([sample], [""], **given, metadata=['{"func_name": "join"}'])
    assert named.values == (1.0,)
    assert code_tests([sample.replace("[b]", "[b, b]")], [""], **given, fn_name=["join"]).values == (0.0,)
    unnamed = code_tests([sample], [""], **given, metadata=["{}"])
    assert unnamed.values == (None,) and "nothing names the function" in unnamed.failures[0].what


def test_a_call_sees_no_state_that_another_left_in_its_solution(tier):
    sample = "class Solution:\n    def __init__(self): self.seen = []\n" \
        "    def f(self, x):\n        self.seen.append(x)\n        return self.seen\n"  # fmt: skip
    assert score([sample], [{"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [2]]}], tier=tier) == [1]


def test_partial_credit_and_the_prompt_as_a_beginning(tier):
    tests = [TEST, "assert add(1, 1) == 3", "assert add(2, 2) == 4", "1 / 0 + add(1, 1)"]
    assert score([ADD], [tests], tier=tier) == [0.0] and score([ADD], [tests], tier=tier, partial=True) == [0.5]
    body = score(["    return a + b\n"], [TEST], ["def add(a, b):\n"], with_prompt=True, tier=tier)
    assert body == [1.0]


def test_under_partial_credit_a_call_that_ends_the_process_costs_its_own_test_only(tier):
    dies = "import os\ndef f(x):\n    if x == 1: os._exit(0)\n    while x == 3: pass\n    return x"
    calls = {"fn_name": "f", "inputs": [[x] for x in range(6)], "outputs": list(range(6))}
    texts = [f"assert f({x}) == {x}" for x in range(6)]
    assert score([dies, dies], [calls, texts], tier=tier, partial=True, seconds=1.0) == [4 / 6, 4 / 6]
    assert score([dies, dies], [calls, texts], tier=tier, seconds=1.0) == [0.0, 0.0]
    always = dies.replace("if x == 1", "if True")
    assert score([always], [calls], tier=tier, partial=True, seconds=1.0) == [0.0]


def test_what_right_programs_may_do_besides(tier):
    """Print, end with sys.exit, run a main of their own, recurse, use threads, answer at length."""
    loud = "def add(a, b):\n    print('x' * 400_000)\n    return a + b\nprint(add(1, 1))"
    main = "if __name__ == '__main__':\n    print(add(*map(int, input().split())))\n    sys.exit(0)\n"
    guard = f"{ADD}import sys\n{main}"
    leaves = f"import sys\n{ADD}sys.exit(0)"
    deep = "import sys\nsys.setrecursionlimit(9000)\ndef add(a, b):\n    return b if a == 0 else 1 + add(a - 1, b)"
    work = "t = threading.Thread(target=lambda: got.append(a + b))"
    threads = f"import threading\ndef add(a, b):\n    got = []\n    {work}\n    t.start(); t.join()\n    return got[0]"
    right = [loud, guard, leaves, deep, threads]
    text = "assert add(2000, 3) == 2003"
    calls = {"fn_name": "add", "inputs": [[2000, 3]], "outputs": [2003]}
    assert score(right * 2, [text] * 5 + [calls] * 5, tier=tier) == [1.0] * 10
    long = "def f(n):\n    return list(range(n))"
    program = "n = int(input())\nprint(' '.join(map(str, range(n))))"
    lines = " ".join(map(str, range(100_000)))
    assert score(
        [long, long, program, guard],
        [{"fn_name": "f", "inputs": [[100_000]], "outputs": [list(range(100_000))]},
         "assert f(100_000) == list(range(100_000))", [{"input": "100000", "output": lines}],
         [{"input": "2 3", "output": "5"}]], tier=tier,
    ) == [1.0] * 4  # fmt: skip


def test_broken_tests_in_the_data_are_failures_of_their_row():
    outcome = code_tests(["x", "x"], ["", ""], tests=[None, []])
    assert outcome.values == (None, None) and "there are none" in outcome.failures[1].what
    kept = RewardSet([load_reward("code", policy=FailurePolicy("default", default_score=-1.0))])
    assert kept.score(["a"], ["x"], [[1]], [{"tests": ""}]).total == [-1.0]
    with pytest.raises(ConfigError, match="no column 'tests', only answer"):
        code_tests(["x"], [""], answer=["1"])


def test_tests_that_cannot_be_run_across_processes_are_failures_of_their_row(tier):
    derives = "class Dog(Animal):\n    pass\nassert Dog().legs == 4"
    module = "import math\nassert legs(math) == 4"
    sample = "class Animal:\n    legs = 4\ndef legs(x): return 4"
    outcome = code_tests([sample] * 2, [""] * 2, tests=[derives, module], tier=tier)
    assert outcome.values == (None, None)
    assert "derives a class from one of the sample's" in outcome.failures[0].what
    assert "passes a module" in outcome.failures[1].what


def test_the_code_in_a_completion():
    assert code_in("a = 1") == "a = 1"
    assert code_in("First\n```python\na = 1\n```\nbetter\n```py\na = 2\n```") == "a = 2\n"
    assert code_in("```\na = 3\n") == "a = 3\n", "cut off before the fence was closed"
