"""Code judged by unit tests, in a sandbox (`sandbox.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Failure, Outcome
from rlhf_ray.rewards.sandbox import Limits, run_python

_FENCED = re.compile(r"```[^\S\n]*(?:python|py|python3)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class UnitTest:
    """Either `code` that is run after the sample's and must not raise, or `stdin` and the `stdout` it must lead to."""

    code: str = ""
    stdin: str = ""
    stdout: str | None = None


def code_tests(
    completions: Sequence[str],
    prompts: Sequence[str],
    *,
    column: str = "tests",
    partial: bool = False,
    with_prompt: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 512,
    tier: str | None = None,
    workers: int | None = None,
    **columns: Any,
) -> Outcome:
    """1 where the code in the completion passes all tests in the data's `column`, else 0. A sample that hangs, dies,
    or uses up its limits has failed its test.

    The code is the last fenced block, else the whole completion. A row's tests are Python text with asserts, a list of
    such texts, a list of `{"input": ..., "output": ...}` for programs that read and print, or verl's
    `{"inputs": [...], "outputs": [...]}`; each also as JSON text.

    Args:
        partial: score the share of tests passed instead.
        with_prompt: the completion goes on with the code that the prompt began.
        seconds: for each test. `memory_mb`: of its address space.
        tier: bubblewrap, landlock or limits; default: the strongest that works here.
        workers: tests at the same time; default: one a core.
    """
    if column not in columns:
        raise ConfigError(f"reward code: the data has no column {column!r}, only {', '.join(columns)}; set args.column")
    limits = Limits(seconds=seconds, memory_mb=memory_mb)
    failures: dict[int, Failure] = {}
    jobs: list[tuple[int, str, UnitTest]] = []
    for row, (prompt, completion, given) in enumerate(zip(prompts, completions, columns[column], strict=True)):
        program = (prompt if with_prompt else "") + code_in(completion)
        try:
            tests = read_tests(given)
        except ValueError as error:
            failures[row] = Failure(f"cannot read the data's own tests ({error})", "mend the data, or set args.column")
            continue
        jobs += [(row, program, test) for test in (tests if partial else joined(tests))]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        passed = list(pool.map(lambda job: passes(job[1], job[2], limits, tier), jobs))
    by_row: dict[int, list[bool]] = {}
    for (row, _, _), right in zip(jobs, passed, strict=True):
        by_row.setdefault(row, []).append(right)
    share = {row: sum(results) / len(results) for row, results in by_row.items()}
    values = (share.get(row) for row in range(len(completions)))
    return Outcome(tuple(v if v is None or partial else float(v == 1) for v in values), failures)


def code_in(completion: str) -> str:
    """The last fenced block; without a fence, everything."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def read_tests(given: Any) -> list[UnitTest]:
    """Raises ValueError if there is no test in it."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # Python text may begin with a bracket too
            given = json.loads(given)
    if isinstance(given, Mapping) and "inputs" in given and "outputs" in given:
        pairs = zip(given["inputs"], given["outputs"], strict=True)
        given = [{"input": read, "output": printed} for read, printed in pairs]
    tests = [_read_test(test) for test in ([given] if isinstance(given, (str, Mapping)) else list(given or ()))]
    if not tests:
        raise ValueError("there are none")
    return tests


def _read_test(given: Any) -> UnitTest:
    if isinstance(given, str) and given.strip():
        return UnitTest(code=given)
    if isinstance(given, Mapping) and {"input", "output"} <= set(given):
        return UnitTest(stdin=str(given["input"]), stdout=str(given["output"]))
    raise ValueError(f"{str(given)[:80]!r} is neither Python text nor an input with its output")


def joined(tests: Sequence[UnitTest]) -> list[UnitTest]:
    """Tests by code as one: if all must pass, one process will do."""
    code = "\n".join(test.code for test in tests if test.stdout is None)
    return [*([UnitTest(code=code)] if code else []), *(test for test in tests if test.stdout is not None)]


def passes(program: str, test: UnitTest, limits: Limits, tier: str | None = None) -> bool:
    if test.stdout is None:
        return run_python(f"{program}\n\n{test.code}\n", limits=limits, tier=tier).finished
    ran = run_python(program, stdin=test.stdin, limits=limits, tier=tier, may_exit=True)
    return ran.finished and _lines(ran.stdout) == _lines(test.stdout)


def _lines(text: str) -> list[str]:
    """Blanks at the ends of lines and empty lines at the end do not count."""
    lines: Iterable[str] = (line.rstrip() for line in text.rstrip().split("\n"))
    return list(lines)
