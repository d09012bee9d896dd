"""When a reward function fails: what went wrong with which rows, and what the run is to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# A reward is a float32 number: beyond this one it would be infinite behind the policy's back.
LARGEST = 3.4e38

OnFailure = Literal["raise", "retry", "drop_group", "default"]


@dataclass(frozen=True)
class FailurePolicy:
    """What to do with rows for which a function gave no finite number.

    `raise` ends the run. `retry` asks again and then ends the run. `drop_group` takes every answer to the same prompt
    out of learning. `default` gives such rows `default_score`, counted in the metrics. `retries` come before any of
    them.
    """

    on_failure: OnFailure = "raise"
    retries: int = 0
    default_score: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why a row has no reward: `what` the function did, and what to do about it (`hint`)."""

    what: str
    hint: str
    whole_call: bool = False  # the call failed, and with it every row

    def message(self, name: str, row: int) -> str:
        return f"reward {name!r} {self.what}{'' if self.whole_call else f' for row {row}'}; {self.hint}"


@dataclass(frozen=True)
class Outcome:
    """What a call came to. Every row stands either in `failures` or has a finite number."""

    values: tuple[float | None, ...]
    failures: Mapping[int, Failure] = field(default_factory=dict)
    cause: BaseException | None = None  # of a call that raised, where it raised in this process
    retries: int = 0  # how often it was asked again on the way here

    @classmethod
    def failed(cls, rows: int, what: str, hint: str, cause: BaseException | None = None) -> Outcome:
        """No row has a number."""
        return cls((None,) * rows, dict.fromkeys(range(rows), Failure(what, hint, whole_call=True)), cause)

    def mended(self, rows: Sequence[int], again: Outcome) -> Outcome:
        """With the failed ones among `rows` replaced by what a second call, for just these rows, gave them."""
        values, failures = list(self.values), dict(self.failures)
        for position, row in enumerate(rows):
            if row in self.failures:
                values[row] = again.values[position]
                del failures[row]
                if position in again.failures:
                    failures[row] = again.failures[position]
        return Outcome(tuple(values), failures, again.cause or self.cause, self.retries + again.retries + 1)

    def as_json(self) -> dict[str, Any]:
        failures = [[row, f.what, f.hint, f.whole_call] for row, f in self.failures.items()]
        return {"values": list(self.values), "failures": failures, "retries": self.retries}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Outcome:
        failures = {row: Failure(*told) for row, *told in given["failures"]}
        return cls(tuple(given["values"]), failures, retries=given["retries"])


def join(parts: Iterable[Outcome]) -> Outcome:
    """The outcomes of consecutive rows as one."""
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    cause, retries = None, 0
    for part in parts:
        failures |= {len(values) + row: failure for row, failure in part.failures.items()}
        values += part.values
        cause, retries = cause or part.cause, retries + part.retries
    return Outcome(tuple(values), failures, cause, retries)


def checked(returned: Any, rows: int) -> Outcome:
    """What a function returned, as one finite float a row; everything else is a failure of its row or of the call."""
    if isinstance(returned, Outcome):
        return returned
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        return Outcome.failed(
            rows, f"returned a {type(returned).__name__}", "it must return a list with one number a row"
        )
    if len(returned) != rows:
        return Outcome.failed(
            rows, f"returned {len(returned)} scores for {rows} completions", "return one for each, in order"
        )
    numbers = [_number(value) for value in returned]
    failures = {row: number for row, number in enumerate(numbers) if isinstance(number, Failure)}
    return Outcome(tuple(None if isinstance(n, Failure) else n for n in numbers), failures)


def raised(error: BaseException, columns: Iterable[str], rows: int) -> Outcome:
    """A call that raised. `columns`: the names of what it was given."""
    hint = "mend the function, or catch the exception there and return a score"
    if isinstance(error, TypeError) and "missing" in str(error):
        hint = f"the data gives it {', '.join(columns)}: add the column to the data, or set it in the reward's args"
    return Outcome.failed(rows, f"raised {type(error).__name__}: {error}", hint, error)


def _number(value: Any) -> float | Failure:
    if value is None:
        return Failure("gave None", "return a number for every row")
    if isinstance(value, (str, bytes)):
        return Failure(f"gave the text {value[:80]!r}", "return a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return Failure(f"gave a {type(value).__name__}", "return a number")
    if not abs(number) <= LARGEST:
        return Failure(f"gave {number}", "return a finite number, of float32's range (guard divisions)")
    return number
