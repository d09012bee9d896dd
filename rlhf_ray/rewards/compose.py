"""Reward functions by name, and their weighted sum."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.builtin import BUILTIN

# Names that every function receives anyway, so that a dataset column cannot come under them a second time.
_OWN_ARGUMENTS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


@dataclass(frozen=True)
class RewardFunction:
    """A function in TRL's convention, with its fixed arguments and its weight in the sum."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)

    def call(self, inputs: Mapping[str, Any]) -> Any:
        """What the function returns (a coroutine, if it is async), given those inputs that it takes."""
        given = {**inputs, **self.args}
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return self.function(**given)
        return self.function(**{p.name: given[p.name] for p in parameters if p.name in given})


def load_reward(
    function: str, *, weight: float = 1.0, args: Mapping[str, Any] | None = None, name: str | None = None
) -> RewardFunction:
    """`function` is a built-in name, `package.module:function`, or `path/to/file.py:function`.

    `args` are passed to every call. `name` labels its metric (default: the function's name).
    Raises ConfigError if there is no such function.
    """
    found = _find(function)
    if not callable(found):
        raise ConfigError(f"reward {function!r} is a {type(found).__name__}, not a function; name a function")
    clash = set(args or {}) & _OWN_ARGUMENTS
    if clash:
        raise ConfigError(f"reward {function!r}: args may not set {sorted(clash)}; each call brings its own")
    return RewardFunction(name or function.rpartition(":")[2], found, weight, dict(args or {}))


class RewardSet:
    """Several reward functions and their weighted sum. Metric names are made unique with _2, _3, ..."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.functions: dict[str, RewardFunction] = {}
        for function in functions:
            name, copies = function.name, 1
            while name in self.functions:
                copies += 1
                name = f"{function.name}_{copies}"
            self.functions[name] = function

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sum of each row, each function's unweighted scores). Async functions run side by side.

        `columns` has one mapping a row; a function receives each column as a list, None where a row lacks it.
        Raises RewardError, which names function and row, for anything but one finite number a row.
        """
        rows = len(completions)
        names = dict.fromkeys(key for row in columns for key in row if key not in _OWN_ARGUMENTS)
        inputs = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
            **{key: [row.get(key) for row in columns] for key in names},
        }
        returned = {name: _guarded(name, function, inputs) for name, function in self.functions.items()}
        waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
        if waiting:
            returned |= _wait(waiting)
        scores = {name: _checked(name, value, rows) for name, value in returned.items()}
        total = [sum(f.weight * scores[name][i] for name, f in self.functions.items()) for i in range(rows)]
        return [float(value) for value in total], scores


def _guarded(name: str, function: RewardFunction, inputs: Mapping[str, Any]) -> Any:
    try:
        return function.call(inputs)
    except ConfigError:
        raise  # a built-in explains its own wrong arguments
    except Exception as error:
        raise _raised(name, error, inputs) from error


def _raised(name: str, error: Exception, inputs: Mapping[str, Any] | None = None) -> RewardError:
    hint = "mend the function, or catch the exception there and return a score"
    missing = isinstance(error, TypeError) and "missing" in str(error)
    if missing and inputs is not None:
        hint = f"the data gives it {', '.join(inputs)}: add the column to the data, or set it in the reward's args"
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; {hint}")


def _wait(waiting: Mapping[str, Any]) -> dict[str, Any]:
    async def each(name: str, awaitable: Any) -> Any:
        try:
            return await awaitable
        except Exception as error:
            raise _raised(name, error) from error

    async def together() -> list[Any]:
        return await asyncio.gather(*(each(name, value) for name, value in waiting.items()))

    return dict(zip(waiting, _run(together()), strict=True))


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # Inside a running loop (a notebook, an async actor) asyncio.run refuses: use a loop in another thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _checked(name: str, returned: Any, rows: int) -> list[float]:
    """One finite float a row. A wrong number would quietly teach the policy something else."""
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned a {type(returned).__name__}; it must return a list with one number a row"
        )
    if len(returned) != rows:
        raise RewardError(
            f"reward {name!r} returned {len(returned)} scores for {rows} completions; return one for each, in order"
        )
    return [_number(name, row, value) for row, value in enumerate(returned)]


def _number(name: str, row: int, value: Any) -> float:
    if value is None:
        raise RewardError(f"reward {name!r} gave None for row {row}; return a number for every row")
    if isinstance(value, (str, bytes)):
        raise RewardError(f"reward {name!r} gave the text {value!r} for row {row}; return a number")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name!r} gave a {type(value).__name__} for row {row}; return a number") from error
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} gave {number} for row {row}; return a finite number (guard divisions)")
    return number


def _find(function: str) -> Any:
    place, colon, attribute = function.rpartition(":")
    if not colon:
        if function in BUILTIN:
            return BUILTIN[function]
        near = difflib.get_close_matches(function, BUILTIN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(BUILTIN)}"
        raise ConfigError(f"reward {function!r} is unknown: {hint} Your own: module:function or file.py:function")
    module = _import_file(place) if place.endswith(".py") else _import_module(place)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; check the spelling"
        raise ConfigError(f"reward {function!r}: {place} has no {attribute!r}{hint}") from error


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module does while it is imported
        raise ConfigError(
            f"reward module {name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or give a path that ends in .py"
        ) from error


def _import_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"reward file {place} does not exist; give the path of a .py file")
    # A name of its own, so that two files called reward.py do not collide; the same file loads once.
    name = f"rlhf_ray_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"reward file {place} cannot be run ({type(error).__name__}: {error}); mend it") from error
    return module
