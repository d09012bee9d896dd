"""Who wants to know of a run's steps: the screen, the loggers, the run directory, and whoever the user names.

    class Slow(Observer):
        def step(self, record):
            if record.metrics["time/step"] > 60:
                print(f"step {record.step} took a minute")

An observer is such an object, or just a function that is given each step's record. It runs in the process of the loop,
between two steps. It cannot change the run: what it is given is frozen, and if it fails it is switched off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from rlhf_ray.config.user_code import find
from rlhf_ray.config.user_frames import frames_of_users
from rlhf_ray.errors import ConfigError


@dataclass(frozen=True)
class StepRecord:
    """What one finished step has done.

    Attributes:
        step: steps done, this one included: from 1.
        steps: how many the run will have.
        metrics: the step's row of metrics.jsonl (docs/metrics.md), `time/` in seconds.
        samples: some of the step's completions, each as a row of rollouts/step_N.jsonl: prompt, completion, reward
            (a supervised run has none), rewards by function, tokens, truncated.
        failures: rewards that failed, one entry each.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()
    failures: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        # One observer must not change what the next is given.
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))


@dataclass(frozen=True)
class Alarm:
    """Something people should look at; the run goes on.

    Attributes:
        kind: one word that a program can compare.
        step: steps done when it was raised.
    """

    kind: str
    reason: str
    step: int


class Observer:
    """What an observer may be told; one that does not override a method is not interested."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def alarm(self, alarm: Alarm) -> None:
        """Something is wrong."""

    def note(self, text: str) -> None:
        """A line for people: what is loaded, what was left out."""

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: those after it will be done, and told, once more."""

    def close(self) -> None:
        """The run ends, also after an error."""


class FromFunction(Observer):
    """A function that is given each step's record."""

    def __init__(self, function: Callable[[StepRecord], Any]) -> None:
        self.function = function

    def step(self, record: StepRecord) -> None:
        self.function(record)


def find_observer(given: Any) -> Callable[[], Observer]:
    """What makes an observer of what a user gives: an Observer or a class of them, a function, or `module:name` of any
    of these. Nothing is made yet.

    Raises:
        ConfigError: it is none of these.
    """
    what = find(given, "observer") if isinstance(given, str) else given
    if isinstance(what, Observer):
        return lambda: what
    if isinstance(what, type) and issubclass(what, Observer):
        return partial(_made, what, given)
    if not callable(what) or isinstance(what, type):
        raise ConfigError(
            f"observer {name_of(given)} is {what!r}; give a function f(record), or a subclass of "
            "rlhf_ray.run.observer.Observer"
        )
    try:
        inspect.signature(what).bind(None)
    except TypeError as error:
        raise ConfigError(f"observer {name_of(given)} is called as f(record), and it has {error}") from error
    except ValueError:  # a built-in function without a signature
        pass
    return partial(FromFunction, what)


def _made(kind: type[Observer], given: Any) -> Observer:
    try:
        return kind()
    except Exception as error:  # whatever the user's class does
        said = f"observer {name_of(given)} cannot be made, without arguments ({type(error).__name__}: {error}); mend it"
        raise ConfigError("\n  ".join([said, *frames_of_users(error)])) from error


def name_of(given: Any) -> str:
    """An observer as people know it."""
    if isinstance(given, str):
        return given
    if isinstance(given, FromFunction):
        given = given.function
    return getattr(given, "__qualname__", type(given).__qualname__)


class Observers:
    """All observers of a run, told one after the other. One that fails is switched off, with an alarm to the others."""

    def __init__(self, observers: Iterable[Observer], steps_done: int = 0) -> None:
        self._observers = list(observers)
        self._steps_done = steps_done

    def step(self, record: StepRecord) -> None:
        self._steps_done = record.step
        self._tell(lambda observer: observer.step(record))

    def alarm(self, alarm: Alarm) -> None:
        self._tell(lambda observer: observer.alarm(alarm))

    def note(self, text: str) -> None:
        self._tell(lambda observer: observer.note(text))

    def rewind(self, step: int) -> None:
        self._steps_done = step
        self._tell(lambda observer: observer.rewind(step))

    def close(self) -> None:
        self._tell(lambda observer: observer.close())

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            if observer not in self._observers:  # an alarm on the way here has shown that it fails
                continue
            try:
                what(observer)
            except Exception as error:  # whatever it does: the run is worth more
                self._observers.remove(observer)
                said = f"{name_of(observer)} is switched off, the run goes on ({type(error).__name__}: {error})"
                self.alarm(Alarm("observer_failed", "\n  ".join([said, *frames_of_users(error)]), self._steps_done))
