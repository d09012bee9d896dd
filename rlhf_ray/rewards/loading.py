"""Finds a reward function by its name in a config: built in, in a module, or in a file."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_ray.config.user_code import find, is_place
from rlhf_ray.errors import ConfigError

# Name -> where it lives. Imported when a config asks for it: some need packages that nobody else needs.
BUILTIN = {
    "exact_answer": "rlhf_ray.rewards.builtin:exact_answer",
    "keyword": "rlhf_ray.rewards.builtin:keyword",
    "regex": "rlhf_ray.rewards.builtin:regex",
    "length_penalty": "rlhf_ray.rewards.builtin:length_penalty",
    "repetition_penalty": "rlhf_ray.rewards.builtin:repetition_penalty",
    "sentiment": "rlhf_ray.rewards.builtin:sentiment",
    "classifier": "rlhf_ray.rewards.classifier:classifier",
    "math": "rlhf_ray.rewards.math_answer:math_answer",
    "rouge": "rlhf_ray.rewards.rouge:rouge",
    "code": "rlhf_ray.rewards.code_tests:code_tests",
    "judge": "rlhf_ray.rewards.judge:judge",
}


def is_http(function: str) -> bool:
    return function.startswith(("http://", "https://"))


def is_builtin(function: str) -> bool:
    return not is_place(function)


def find_function(function: str) -> Callable[..., Any]:
    """`function` is a built-in name, `package.module:function`, or `path/to/file.py:function`.

    Raises:
        ConfigError: there is no such function.
    """
    found = _find(function)
    if not callable(found):
        raise ConfigError(f"reward {function!r} is a {type(found).__name__}, not a function; name a function")
    return found


def check_builtin(function: str) -> None:
    """Raises ConfigError, with the nearest name, if no built-in reward is called so."""
    if function in BUILTIN:
        return
    near = difflib.get_close_matches(function, BUILTIN, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(BUILTIN)}."
    raise ConfigError(f"reward {function!r} is unknown: {hint} Your own: module:function or file.py:function")


def check_settings(function: str, found: Callable[..., Any], args: Mapping[str, Any]) -> None:
    """Raises ConfigError if a built-in reward is given a setting that it does not have, or lacks one that it needs."""
    if function == "judge":
        return  # whose settings are a section of the config
    parameters = inspect.signature(found).parameters.values()
    settings = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = [name for name in args if name not in settings]
    missing = [name for name, p in settings.items() if p.default is p.empty and name not in args]
    if unknown or missing:
        what = f"has no setting {unknown[0]!r}" if unknown else f"needs {missing[0]!r}, which is not set"
        raise ConfigError(f"reward {function} {what}; its args are {', '.join(settings) or 'none'}")


def _find(function: str) -> Any:
    if is_builtin(function):
        check_builtin(function)
        module_name, _, attribute = BUILTIN[function].partition(":")
        return getattr(importlib.import_module(module_name), attribute)
    return find(function, "reward")
