"""When a reward function fails: what went wrong with which rows, and what the run is to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.user_frames import frames_of_users

_TOO_LARGE = f"rewards end at {LARGEST_REWARD:g}, where float32's sums of squares do; scale it, or lower its weight"

OnFailure = Literal["raise", "retry", "drop_group", "default"]


@dataclass(frozen=True)
class FailurePolicy:
    """What to do with rows for which a function gave no finite number (nor None, where somebody else judged the row).

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
    where: tuple[str, ...] = ()  # of what was raised: the lines of the user's own files, the innermost last

    def message(self, name: str, row: int, retries: int = 0) -> str:
        said = f"reward {name!r} {self.what}{'' if self.whole_call else f' for row {row}'}; {self.hint}"
        said += f" (asked {retries + 1} times)" if retries else ""
        return "\n  ".join([said, *self.where])


@dataclass(frozen=True)
class Outcome:
    """What a call came to: of each row a finite number, or a failure, or neither.

    Neither is TRL's None: the row is not this function's to judge.
    """

    values: tuple[float | None, ...]
    failures: Mapping[int, Failure] = field(default_factory=dict)
    cause: BaseException | None = None  # of a call that raised, where it raised in this process
    retries: int = 0  # how often it was asked again on the way here

    @classmethod
    def failed(
        cls, rows: int, what: str, hint: str, cause: BaseException | None = None, where: tuple[str, ...] = ()
    ) -> Outcome:
        """No row has a number."""
        failure = Failure(what, hint, whole_call=True, where=where)
        return cls((None,) * rows, dict.fromkeys(range(rows), failure), cause)

    def judged(self, row: int) -> bool:
        """Whether it has an opinion of the row, or should have had one."""
        return self.values[row] is not None or row in self.failures

    def failing(self, failures: Mapping[int, Failure]) -> Outcome:
        """With these failures too; such rows have no number."""
        values = tuple(None if row in failures else value for row, value in enumerate(self.values))
        return Outcome(values, {**self.failures, **failures}, self.cause, self.retries)

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
        failures = [[row, f.what, f.hint, f.whole_call, list(f.where)] for row, f in self.failures.items()]
        return {"values": list(self.values), "failures": failures, "retries": self.retries}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Outcome:
        failures = {row: Failure(*told, tuple(where)) for row, *told, where in given["failures"]}
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
    """What a function returned: one finite float a row, or None where the row is not its own (TRL's convention).

    Everything else is a failure of its row or of the call.
    """
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
    where = frames_of_users(error)
    hint = "mend the function, or catch the exception there and return a score"
    # With frames of its own the function was entered: then it is a mistake inside it, not a column that is missing.
    if isinstance(error, TypeError) and "missing" in str(error) and not where:
        hint = f"the data gives it {', '.join(columns)}: add the column to the data, or set it in the reward's args"
    return Outcome.failed(rows, f"raised {type(error).__name__}: {error}", hint, error, where)


def unjudged(outcomes: Mapping[str, Outcome], rows: int) -> dict[str, Outcome]:
    """A row for which every function gave None has no reward: a failure of each of them, by its own policy."""
    lost = [row for row in range(rows) if not any(outcome.judged(row) for outcome in outcomes.values())]
    if not lost:
        return dict(outcomes)
    others = "" if len(outcomes) == 1 else f", as did every other function ({', '.join(outcomes)})"
    hint = f"so nobody judged it{others}: return a number, or add a reward that judges such rows"
    failures = dict.fromkeys(lost, Failure("gave None", hint))
    return {name: outcome.failing(failures) for name, outcome in outcomes.items()}


def too_large(outcomes: Mapping[str, Outcome], weights: Mapping[str, float], rows: int) -> dict[str, Outcome]:
    """Weighted scores beyond `LARGEST_REWARD`, and sums of them, are failures of the function with the largest part."""
    found: dict[str, dict[int, Failure]] = {name: {} for name in outcomes}
    for row in range(rows):
        parts = {
            name: weights[name] * outcome.values[row]
            for name, outcome in outcomes.items()
            if outcome.values[row] is not None
        }
        largest = max(parts, key=lambda name: abs(parts[name]), default=None)
        total = sum(parts.values())
        if largest is None or max(abs(parts[largest]), abs(total)) <= LARGEST_REWARD:
            continue
        what = f"gave {outcomes[largest].values[row]:g} ({parts[largest]:g} with its weight, in a sum of {total:g})"
        found[largest][row] = Failure(what, _TOO_LARGE)
    return {name: outcome.failing(found[name]) if found[name] else outcome for name, outcome in outcomes.items()}


def _number(value: Any) -> float | Failure | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        return Failure(f"gave the text {value[:80]!r}", "return a number")
    try:
        number = float(value)
    except OverflowError:
        return Failure("gave a number beyond every float", _TOO_LARGE)
    except (TypeError, ValueError):
        return Failure(f"gave a {type(value).__name__}", "return a number")
    if not math.isfinite(number):
        return Failure(f"gave {number}", "return a finite number (guard divisions)")
    return number if abs(number) <= LARGEST_REWARD else Failure(f"gave {number:g}", _TOO_LARGE)
