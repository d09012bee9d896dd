"""What a sample changes in its arguments: seen by a test that looks at them, and no way to pass one that computes from
them what is right.
"""

from __future__ import annotations

import ast

import pytest

from rlhf_ray.rewards.code_changes import ALL, kept_arguments
from rlhf_ray.rewards.code_tests import code_tests

SEEN = {  # a test that must see what f changed in x
    "a slice": "k = f(x)\nassert k == 2\nassert x[:k] == [1, 2]",
    "in one expression": "assert f(x) == 2 and x[:2] == [1, 2]",
    "in one pair": "assert (f(x), x[:2]) == (2, [1, 2])",
    "by name": "assert f(nums=x) == 2\nassert x[:2] == [1, 2]",
    "item by item": "want = [1, 2]\nk = f(x)\nassert k == len(want)\nfor i in range(k):\n    assert x[i] == want[i]",
    "sorted": "k = f(x)\nassert k == 2\nassert sorted(x[:k]) == [1, 2]",
    "its length, too": "k = f(x)\nassert k <= len(x)\nassert x[:k] == [1, 2]",
    "against a copy made before": "copy = list(x)\nk = f(x)\nassert k == 2\nassert x[:k] == sorted(set(copy))",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        k = f(x)\n"
    "        self.assertEqual(x[:k], [1, 2])",
    "a table": "for nums, want in zip([x], [[1, 2]]):\n    k = f(nums)\n    assert k == len(want)\n"
    "    assert nums[:k] == want",
    "a table of dicts": "for row in [{'x': x, 'want': [1, 2]}]:\n    k = f(row['x'])\n"
    "    assert k == len(row['want'])\n    assert row['x'][:k] == row['want']",
    "a helper": "def run(nums):\n    k = f(nums)\n    return k, nums[:k]\nassert run(x) == (2, [1, 2])",
    "a method": "s = Solution()\nk = s.f(x)\nassert k == 2\nassert x[:k] == [1, 2]",
    "a library": "import numpy as np\nk = f(x)\nassert np.sum(k) == 2\nassert np.array_equal(x[:k], np.array([1, 2]))",
    "a name like a comparison's": "k = closest(x)\nassert k == 2\nassert x[:k] == [1, 2]",
}  # fmt: skip

SOURCES = {  # what is right is computed from x after the call
    "in one expression": "assert f(x) == sorted(x)",
    "in two steps": "r = f(x)\nwant = sorted(x)\nassert r == want",
    "by another name": "y = x\nassert f(x) == sorted(y)",
    "of one assignment": "y = x = [2, 1]\nassert f(x) == sorted(y)",
    "from a list of arguments": "args = [x]\nassert f(*args) == sorted(x)",
    "by place": "rows = [x]\nfor i, row in enumerate(rows):\n    assert f(row) == sorted(rows[i])",
    "item by item": "r = f(x)\nassert len(r) == len(x) and all(a == b for a, b in zip(r, sorted(x)))",
    "a difference": "assert abs(f(x) - sum(x)) < 1e-6",
    "a checker": "def right(a, b):\n    return sorted(a) == b\nr = f(x)\nassert right(x, r)",
    "a helper": "def run(nums):\n    return f(nums)\nassert run(x) == sorted(x)",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
    "        self.assertEqual(f(x), sorted(x))",
    "a lambda": "g = lambda nums: f(nums)\nassert g(x) == sorted(x)",
    "results kept in a list": "rows, got = [x], []\nfor row in rows:\n    got.append(f(row))\n"
    "for row, r in zip(rows, got):\n    assert r == sorted(row)",
    "results kept by place": "got = [0]\nfor i in range(1):\n    got[i] = f(x)\nassert got[0] == sorted(x)",
    "one item is fixed": "r = f(x)\nassert x[0] == 1\nassert r == sorted(x)",
}


def kept(text):
    found = kept_arguments(ast.parse(text))
    return {ast.unparse(call.func): keys for call, keys in found.items() if call.args or call.keywords}


@pytest.mark.parametrize("kind", SEEN)
def test_a_test_that_looks_at_its_argument_sees_the_changes(kind):
    name = {"a method": "s.f", "a name like a comparison's": "closest"}.get(kind, "f")
    assert kept(SEEN[kind])[name] == (("nums",) if kind == "by name" else (0,))


@pytest.mark.parametrize("kind", SOURCES)
def test_an_argument_that_says_what_is_right_stays_as_it_was(kind):
    assert "f" not in kept(SOURCES[kind])


def test_of_two_arguments_each_has_its_own_say():
    assert kept("r = f(x, y)\nassert x == [1]\nassert r == sorted(y)") == {"f": (0,)}
    assert kept("r = f(*rows)\nassert r == 2") == {"f": (ALL,)}
    assert kept("x = [2, 1]\nr = f(x)\nx = [3]\nassert r == sorted(x)") == {"f": (0,)}, "another list of that name"


IN_PLACE = """
def f(nums):
    nums[:] = sorted(set(nums)) + [0]
    return len(nums) - 1
closest = f
class Solution:
    def f(self, nums): return f(nums)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("sandbox")
def test_right_solutions_score_and_those_that_empty_their_argument_do_not(tier):
    texts = [f"x = [1, 1, 2]\n{text}" for text in SEEN.values()]
    assert scores(IN_PLACE, texts, tier) == dict.fromkeys(texts, 1.0)
    assert scores(IN_PLACE.replace("nums[:] =", "other ="), texts, tier) == dict.fromkeys(texts, 0.0)
    texts = [f"x = [2, 1, 1]\n{text}" for text in SOURCES.values()]
    for cheat in ("nums.clear(); return []", "nums[:] = [0]; return 0", "nums[:] = [1]; return [1]"):
        assert scores(f"def f(nums): {cheat}", texts, tier) == dict.fromkeys(texts, 0.0)


@pytest.mark.slow
@pytest.mark.xdist_group("sandbox")
def test_a_test_may_forbid_changes(tier):
    text = "x = [2, 1]\nr = f(x)\nassert r == [1, 2]\nassert x == [2, 1]"
    samples = ["def f(x): return sorted(x)", "def f(x):\n    x.sort()\n    return list(x)"]
    outcome = code_tests(samples, ["", ""], tests=[text, text], tier=tier)
    assert outcome.values == (1.0, 0.0)


def scores(sample, texts, tier):
    outcome = code_tests([sample] * len(texts), [""] * len(texts), tests=texts, tier=tier)
    assert not outcome.failures
    return dict(zip(texts, outcome.values, strict=True))
