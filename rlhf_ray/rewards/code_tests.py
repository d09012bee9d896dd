"""Code judged by unit tests, in a sandbox (`sandbox.py`); tests and verdicts are never in the sample's process."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.code_forms import NAME_COLUMNS, Test, read_tests
from rlhf_ray.rewards.code_running import CannotJudge, Setting, groups, results
from rlhf_ray.rewards.failures import Failure, Outcome
from rlhf_ray.rewards.sandbox import Limits

_PYTHON = ("python", "py", "python3", "py3")


@dataclass
class _Row:
    """`passed` grows as its tests are run; without partial credit, the first failed one ends the row."""

    program: str
    tests: list[Test]
    passed: list[bool] = field(default_factory=list)
    failure: Failure | None = None


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

    The code is what `code_in` finds. A row's tests are in one of the forms of
    `code_forms.read_tests` (docs/rewards.md lists them).

    Args:
        partial: score the share of tests passed instead.
        with_prompt: the completion goes on with the code that the prompt began.
        seconds: for each test. `memory_mb`: of its address space.
        tier: bubblewrap, landlock or limits; default: the strongest that works here.
        workers: tests at the same time; default: one a core.
    """
    if column not in columns:
        raise ConfigError(f"reward code: the data has no column {column!r}, only {', '.join(columns)}; set args.column")
    setting = Setting(Limits(seconds=seconds, memory_mb=memory_mb), tier, partial)
    failures: dict[int, Failure] = {}
    rows: dict[int, _Row] = {}
    for row, (prompt, completion, given) in enumerate(zip(prompts, completions, columns[column], strict=True)):
        try:
            tests = read_tests(given, _name_of_function(columns, row))
        except ValueError as error:
            failures[row] = Failure(f"cannot read the data's own tests ({error})", "mend the data, or set args.column")
            continue
        rows[row] = _Row((prompt if with_prompt else "") + code_in(completion), tests)
    jobs = [(row, group) for row in rows.values() for group in groups(row.tests)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: _run(*job, setting), jobs))
    failures |= {number: row.failure for number, row in rows.items() if row.failure is not None}
    values = (None if number in failures else _score(rows[number], partial) for number in range(len(completions)))
    return Outcome(tuple(values), failures)


def code_in(completion: str) -> str:
    """The last fenced block that says it is Python; else the last without a language; without a fence, everything.
    What stands before `</think>` is not looked at.
    """
    answer = completion.rpartition("</think>")[2]
    blocks = list(_fenced(answer))
    for labels in (_PYTHON, ("",)):
        if found := [text for label, text in blocks if label.lower() in labels]:
            return found[-1]
    return "" if blocks else answer


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, contents) of each fenced block; the last may not be closed. Those in a list are indented with it."""
    lines = iter(text.split("\n"))
    for line in lines:
        fence = next((fence for fence in ("```", "~~~") if line.count(fence) == 1), "")
        label = line.partition(fence)[2].lstrip(fence[0]) if fence else "`"
        if "`" in label:
            continue  # code within a line
        kept: list[str] = []
        depth = len(line) - len(line.lstrip()) + 3
        for inner in lines:
            if inner.strip() == fence and len(inner.rstrip()) - len(fence) <= depth:
                break  # deeper, it is a fence within the code's own text, as in a docstring
            kept.append(inner)
            if inner.rstrip().endswith(fence) and inner.count(fence) == 1 and inner.strip() != fence:
                kept[-1] = inner.rstrip().removesuffix(fence)
                break
        yield (label.split() or [""])[0], textwrap.dedent("\n".join(kept)).rstrip() + "\n"


def _name_of_function(columns: Mapping[str, Any], row: int) -> str:
    """As HumanEval (`entry_point`) and LiveCodeBench (`metadata`, which may be JSON text) give it, beside the tests."""
    beside = {name: columns[name][row] for name in NAME_COLUMNS if name in columns}
    metadata = columns["metadata"][row] if "metadata" in columns else None
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    if isinstance(metadata, Mapping):
        beside = {**metadata, **{name: value for name, value in beside.items() if value}}
    return next((str(beside[name]) for name in NAME_COLUMNS if beside.get(name)), "")


def _run(row: _Row, group: list[Test], setting: Setting) -> None:
    if row.failure is not None or not (setting.partial or all(row.passed)):
        return
    try:
        row.passed += results(row.program, group, setting)
    except CannotJudge as error:
        row.failure = Failure(f"cannot run the data's own tests ({error})", "mend the data, or leave such rows out")


def _score(row: _Row, partial: bool) -> float:
    if partial:
        return sum(row.passed) / len(row.tests)
    return float(all(row.passed))
