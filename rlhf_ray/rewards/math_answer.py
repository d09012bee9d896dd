"""Is the answer to a mathematics problem right? Both sides are read by one rule, and math-verify compares what is left.

Some answers (towers of powers) keep a computer algebra system busy for ever, and math-verify's own time limits work on
a main thread only and not inside C code. So it runs in a process that may be killed.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import resource
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Failure, Outcome
from rlhf_ray.rewards.math_reading import Answer, read_answer, with_unit
from rlhf_ray.rewards.process import Child, ChildLost

_MEMORY_BYTES = 4 << 30
# math-verify stops itself first where it can: cheaper than a new process.
_OWN_SECONDS = 2


def math_answer(
    completions: Sequence[str], *, column: str = "answer", seconds: float = 6.0, **columns: Any
) -> Outcome:
    r"""1 where the completion's final answer equals the one in the data's `column`, else 0.

    Both are read by the same rule (`math_reading.final_part`): the last box, else what follows the last `####`, else
    what follows "the answer is", else a text that is nothing but an answer, else the last formula or number in it.
    Words (`\text{Nora}`, a letter, a date, a time, a number in another base) must be the same words; everything else
    must be equal as mathematics, and units must agree where both sides have one. An answer that takes longer than
    `seconds` to check counts as wrong. A row without an answer is not this function's (None); an answer in which there
    is nothing to read is a failure of its row.
    """
    if column not in columns:
        raise ConfigError(f"reward math: the data has no column {column!r}, only {', '.join(columns)}; set args.column")
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("reward math needs math-verify; pip install 'rlhf-ray[rewards]'")
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    for row, (completion, right) in enumerate(zip(completions, columns[column], strict=True)):
        gold = None if right is None else _right_answer(str(right))
        if gold is not None and not gold.latex:
            hint = "mend the data, or name the column with the answer in args.column"
            failures[row] = Failure(f"cannot read the data's own answer {str(right)[-80:]!r}", hint)
        judged = gold is not None and row not in failures
        values.append(float(_same(gold, read_answer(completion), seconds)) if judged else None)
    return Outcome(tuple(values), failures)


_right_answer = functools.lru_cache(maxsize=4096)(read_answer)  # of all answers to a prompt


def _same(right: Answer, given: Answer, seconds: float) -> bool:
    right, given = with_unit(right, given.unit), with_unit(given, right.unit)
    if not given.latex or (right.unit and given.unit and right.unit != given.unit):
        return False
    if "percent" in (right.unit, given.unit) and right.unit != given.unit:
        return _same_percentage(right, given, seconds)
    return _equal(right, given, seconds)


def _same_percentage(right: Answer, given: Answer, seconds: float) -> bool:
    """50 % is 0.5; it is 50, too, where its sign was left out. Of 0.5 nobody knows that, and 0.5 is not 0.5 %."""
    percent, plain = (right, given) if right.unit else (given, right)
    if percent.number is not None and abs(percent.number) >= 1 and _equal(percent, plain, seconds):
        return True
    share = Answer(f"\\frac{{{percent.latex}}}{{100}}", words=percent.words)
    return _equal(share, plain, seconds) if right.unit else _equal(plain, share, seconds)


def _equal(right: Answer, given: Answer, seconds: float) -> bool:
    if right.words or given.words:
        return right.words and given.words and right.latex == given.latex
    if right.number is not None and given.number is not None:
        return right.number == given.number
    if right.latex.replace(" ", "") == given.latex.replace(" ", ""):
        return True
    return _compared(right.latex, given.latex, seconds)


@functools.lru_cache(maxsize=8192)  # the answers of a group are often the same
def _compared(right: str, given: str, seconds: float) -> bool:
    try:
        return bool(_checker().call((right, given), seconds))
    except ChildLost as lost:
        if lost.timed_out:
            return False
        raise


@functools.lru_cache(maxsize=1)
def _checker() -> Child:
    return Child("rlhf_ray.rewards.math_answer:make_checker", {})


def make_checker() -> Callable[[tuple[str, str]], float]:
    """In the child: (right answer, completion's answer) -> 1 or 0."""
    from rlhf_ray.rewards.math_equality import Equality

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    equality = Equality(_OWN_SECONDS)

    def check(row: tuple[str, str]) -> float:
        try:
            return float(equality.equal(*row))
        except (Exception, MemoryError):  # whatever a computer algebra system does with nonsense: it is not the answer
            return 0.0

    return check
