"""Reward functions written for verl or OpenRLHF, made to look like TRL's.

verl (`custom_reward_function`): `compute_score(data_source, solution_str, ground_truth, extra_info)`, one row a call,
or its batch form with every name in the plural; a number, or a dict with `score`. OpenRLHF (`remote_rm_url=x.py`):
`reward_func(queries, prompts, labels)`; a tensor or list, or a dict with `rewards`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Outcome, checked, join, raised

Adapter = Literal["auto", "trl", "verl", "openrlhf"]

# Where a label may stand, by the names that data sets give it; the first that the data has counts.
_LABELS = ("label", "labels", "ground_truth", "answer")


def adapt(function: Callable[..., Any], adapter: Adapter, args: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` in TRL's convention, with `args` already given where the convention differs from TRL's."""
    convention = _convention(function) if adapter == "auto" else adapter
    if convention == "trl":
        return function
    bound = functools.partial(function, **args) if args else function
    if convention == "openrlhf":
        return _openrlhf(bound)
    return _verl_batch(bound) if "solution_strs" in _parameters(function) else _verl(bound)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _convention(function: Callable[..., Any]) -> str:
    names = _parameters(function)
    if names & {"solution_str", "solution_strs"}:
        return "verl"
    return "openrlhf" if "queries" in names and "completions" not in names else "trl"


def _taking(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, given only those arguments that it has: many a compute_score leaves out the source or the extras."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function
    if inspect.iscoroutinefunction(function):

        async def awaited(**given: Any) -> Any:
            return await function(**{name: value for name, value in given.items() if name in parameters})

        return awaited
    return lambda **given: function(**{name: value for name, value in given.items() if name in parameters})


# ---- verl -----------------------------------------------------------------------------------------------------


def _verl(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    """A row that raises fails alone."""
    compute_score = _taking(compute_score)
    if inspect.iscoroutinefunction(compute_score):

        async def rows_together(completions: Sequence[str], **columns: Any) -> Outcome:
            async def one(row: Mapping[str, Any]) -> Outcome:
                try:
                    return _verl_row(await compute_score(**row))
                except Exception as error:
                    return _one_raised(error, row)

            return join(await asyncio.gather(*map(one, _verl_rows(completions, columns))))

        return rows_together

    def row_by_row(completions: Sequence[str], **columns: Any) -> Outcome:
        def one(row: Mapping[str, Any]) -> Outcome:
            try:
                return _verl_row(compute_score(**row))
            except ConfigError:
                raise
            except Exception as error:
                return _one_raised(error, row)

        return join(map(one, _verl_rows(completions, columns)))

    return row_by_row


def _verl_batch(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    compute_score = _taking(compute_score)

    def all_rows(completions: Sequence[str], **columns: Any) -> Any:
        rows = _verl_rows(completions, columns)
        plural = {f"{name}s": [row[name] for row in rows] for name in rows[0]} if rows else {}
        returned = compute_score(**plural) if rows else []
        # A list of dicts is verl's; anything else is judged as what it is.
        return [_verl_score(value) for value in returned] if isinstance(returned, (list, tuple)) else returned

    return all_rows


def _verl_rows(completions: Sequence[str], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """verl's columns: `data_source`, `reward_model: {ground_truth: ...}`, `extra_info`."""
    rows = []
    for index, completion in enumerate(completions):
        row = {name: values[index] for name, values in columns.items()}
        model = row.get("reward_model")
        truth = model.get("ground_truth") if isinstance(model, Mapping) else None
        if truth is None:
            truth = next((row[name] for name in ("ground_truth", "answer") if row.get(name) is not None), None)
        rows.append({
            "data_source": row.get("data_source"), "solution_str": completion, "ground_truth": truth,
            "extra_info": dict(row.get("extra_info") or {}),
        })  # fmt: skip
    return rows


def _verl_row(returned: Any) -> Outcome:
    return checked([_verl_score(returned)], 1)


def _verl_score(returned: Any) -> Any:
    """A dict without a score stays one: None would mean that the row is not the function's to judge."""
    return returned.get("score", returned) if isinstance(returned, dict) else returned


def _one_raised(error: Exception, row: Mapping[str, Any]) -> Outcome:
    return raised(error, row, 1)


# ---- OpenRLHF -------------------------------------------------------------------------------------------------


def _openrlhf(reward_func: Callable[..., Any]) -> Callable[..., Any]:
    def queries_of(
        prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = next((name for name in _LABELS if name in columns), None)
        return {
            "queries": [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            "prompts": prompts,
            "labels": columns[name] if name else [None] * len(prompts),
        }

    def rewards_in(returned: Any) -> Any:
        rewards = returned.get("rewards") if isinstance(returned, dict) else returned
        values = rewards.tolist() if hasattr(rewards, "tolist") else rewards
        if isinstance(values, (list, tuple)):  # also [B, 1], as reward models give them
            return [value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values]
        return values

    if inspect.iscoroutinefunction(reward_func):

        async def awaited(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Any:
            return rewards_in(await reward_func(**queries_of(prompts, completions, columns)))

        return awaited

    def called(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Any:
        return rewards_in(reward_func(**queries_of(prompts, completions, columns)))

    return called
