"""Is the answer to a mathematics problem right? math-verify reads both sides and compares them as mathematics.

Some answers (towers of powers) keep a computer algebra system busy for ever, and math-verify's own time limits work on
a main thread only and not inside C code. So it runs in a process that may be killed.
"""

from __future__ import annotations

import functools
import logging
import resource
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Failure, Outcome
from rlhf_ray.rewards.process import Child, ChildLost

_MEMORY_BYTES = 4 << 30
# math-verify stops itself first where it can: cheaper than a new process.
_OWN_SECONDS = 2
# How GSM8K marks its final answer.
_FINAL_MARK = "####"


def math_answer(
    completions: Sequence[str], *, column: str = "answer", seconds: float = 6.0, **columns: Any
) -> Outcome:
    """1 where the completion's final answer equals the one in the data's `column`, else 0.

    The final answer is what follows the last `####`, else what math-verify finds (a box, "the answer is", the last
    number). An answer that takes longer than `seconds` to check counts as wrong; one in the data that cannot be read
    is a failure of its row.
    """
    if column not in columns:
        raise ConfigError(f"reward math: the data has no column {column!r}, only {', '.join(columns)}; set args.column")
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    for row, (completion, right) in enumerate(zip(completions, columns[column], strict=True)):
        value = _check(completion, str(right), seconds)
        values.append(value)
        if value is None:
            hint = "mend the data, or name the column with the answer in args.column"
            failures[row] = Failure(f"cannot read the data's own answer {str(right)[-80:]!r}", hint)
    return Outcome(tuple(values), failures)


def _check(completion: str, right: str, seconds: float) -> float | None:
    try:
        return _checker().call((completion, right), seconds)
    except ChildLost as lost:
        if lost.timed_out:
            return 0.0
        raise


@functools.lru_cache(maxsize=1)
def _checker() -> Child:
    return Child("rlhf_ray.rewards.math_answer:make_checker", {})


def make_checker() -> Callable[[tuple[str, str]], float | None]:
    """In the child: (completion, right answer) -> 1, 0, or None if the right answer itself cannot be read."""
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(f"reward math needs math-verify ({error}); pip install 'rlhf-ray[rewards]'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

    @functools.lru_cache(maxsize=4096)  # every answer of a group is compared with the same one
    def right_answer(text: str) -> tuple[Any, ...]:
        return tuple(math_verify.parse(final_part(text), parsing_timeout=_OWN_SECONDS))

    def check(row: tuple[str, str]) -> float | None:
        completion, right = row
        gold = list(right_answer(right))
        if not gold:
            return None
        try:
            given = math_verify.parse(final_part(completion), parsing_timeout=_OWN_SECONDS)
            return float(math_verify.verify(gold, given, timeout_seconds=_OWN_SECONDS))
        except (Exception, MemoryError):  # whatever a computer algebra system does with nonsense: it is not the answer
            return 0.0

    return check


def final_part(text: str) -> str:
    """What follows the last `####`; without one, the text."""
    _, mark, answer = text.rpartition(_FINAL_MARK)
    return answer.strip() if mark else text
