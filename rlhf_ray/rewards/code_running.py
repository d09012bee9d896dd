"""Runs a sample's tests: each kind in its own way, as few processes as the tests allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.rewards.code_compare import NotPlain, plain, same, same_output
from rlhf_ray.rewards.code_forms import FunctionTest, ProgramTest, Test, TextTest, about_texts
from rlhf_ray.rewards.code_wire import Encoder
from rlhf_ray.rewards.sandbox import Limits, run_python
from rlhf_ray.rewards.sandbox_session import Ended, judge_session, sample_session

# A test that ends its process, or hangs, costs a new one. After so many of them the rest of the group has failed.
_MOST_PROCESSES = 5


class CannotJudge(Exception):
    """A test needs what tests cannot have here, whatever the sample is like."""


@dataclass(frozen=True)
class Setting:
    limits: Limits
    tier: str | None
    partial: bool


def groups(tests: Sequence[Test]) -> list[list[Test]]:
    """Tests that share a process: all calls, all texts. A program reads and prints once, so each has its own."""
    shared = [[test for test in tests if isinstance(test, kind)] for kind in (FunctionTest, TextTest)]
    return [group for group in shared if group] + [[test] for test in tests if isinstance(test, ProgramTest)]


def results(program: str, group: Sequence[Test], setting: Setting) -> list[bool]:
    """Which of the tests are passed; without partial credit, at least one False if not all are."""
    first = group[0]
    if isinstance(first, ProgramTest):
        return [_prints(program, first, setting)]
    if isinstance(first, TextTest) and not setting.partial:
        # All or nothing: as one text, as a test file is.
        group = [TextTest("\n".join(test.code for test in group if isinstance(test, TextTest)))]
    passed: list[bool] = []
    for _ in range(_MOST_PROCESSES):
        passed += _in_one_process(program, group[len(passed) :], setting)
        if len(passed) == len(group) or not (setting.partial or all(passed)):
            break
    return passed + [False] * (len(group) - len(passed))


def _in_one_process(program: str, tests: Sequence[Test], setting: Setting) -> list[bool]:
    """Up to the first test that ends it."""
    limits, passed = setting.limits, list[bool]()
    options = {"limits": limits, "tier": setting.tier, "calls": len(tests)}
    texts = [test.code for test in tests if isinstance(test, TextTest)]
    leetcode = not texts or "class Solution" in program
    with (
        judge_session(program, about_texts(texts), leetcode=leetcode, **options)
        if texts
        else sample_session(program, leetcode=leetcode, **options)
    ) as session:
        try:
            if not session.ask(None, limits.seconds).get("loaded"):
                return [False] * len(tests)
        except Ended:
            return [False] * len(tests)
        for test in tests:
            try:
                right, alive = _asked(session, test, limits.seconds)
            except Ended:
                right, alive = False, False
            passed.append(right)
            if not alive or not (right or setting.partial):
                break
    return passed


def _asked(session: Any, test: Test, seconds: float) -> tuple[bool, bool]:
    """Was it passed, and does the sample's process live?"""
    if isinstance(test, TextTest):
        verdict = session.ask({"test": test.code}, seconds)
        if "cannot" in verdict:
            raise CannotJudge(verdict["cannot"])
        return verdict["passed"] is True, not verdict.get("gone")
    assert isinstance(test, FunctionTest)
    calls = [[Encoder(_no_data).encode(part) for part in reading] for reading in test.readings]
    reply = session.ask({"do": "function", "name": test.name, "calls": calls}, seconds)
    try:
        got = plain(reply["value"])
        return any(same(got, expected) for expected in test.expected), True
    except (KeyError, NotPlain, RecursionError):
        return False, True


def _prints(program: str, test: ProgramTest, setting: Setting) -> bool:
    # As much as is asked for may be printed, and as much again.
    wanted = replace(setting.limits, output_kb=max(setting.limits.output_kb, 2 * len(test.stdout.encode()) // 1000))
    ran = run_python(program, stdin=test.stdin, limits=wanted, tier=setting.tier)
    return ran.finished and same_output(ran.stdout, test.stdout)


def _no_data(value: Any) -> Any:
    raise CannotJudge(f"a {type(value).__name__} among the arguments is no JSON")
