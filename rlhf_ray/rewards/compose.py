"""Several reward functions: their weighted sum, and what happens to rows for which one of them failed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_ray.config.given import GivenFunction
from rlhf_ray.config.redacted import redacted
from rlhf_ray.config.rewards import RewardConfig, default_name
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.adapters import Adapter
from rlhf_ray.rewards.calling import Inputs, IsolatedFunction, RewardFunction, bind, start, together
from rlhf_ray.rewards.failures import FailurePolicy, Outcome, too_large, unjudged
from rlhf_ray.rewards.loading import check_builtin, is_builtin, is_http

# Names that every function receives anyway, so that a dataset column cannot come under them a second time.
_OWN_ARGUMENTS = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})

# Before the first repetition of a call; doubled for each further one.
_FIRST_PAUSE_S = 0.1


@dataclass(frozen=True)
class Rewards:
    """Scores of a batch.

    A function's own number is NaN where it did not judge the row, or failed and its policy is to drop the group. Only
    the latter makes the sum NaN.
    """

    total: list[float]  # [B] weighted sum over the functions that judged the row
    by_function: dict[str, list[float]]  # name -> [B] unweighted
    keep: list[bool]  # [B] False: the row's group was dropped
    stats: dict[str, float]  # fault/retries, fault/dropped (groups), fault/defaulted (rows)
    events: list[dict[str, Any]] = field(default_factory=list)


def load_reward(
    function: str,
    *,
    weight: float = 1.0,
    args: Mapping[str, Any] | None = None,
    name: str | None = None,
    policy: FailurePolicy | None = None,
    isolated: bool = False,
    timeout_s: float = 300.0,
    adapter: Adapter = "auto",
) -> RewardFunction:
    """`function` is a built-in name, `package.module:function`, `path/to/file.py:function`, or a reward server's URL.

    Args:
        args: passed to every call.
        name: labels its metric; default: the function's name.
        isolated: run it in a process of its own, which is killed if a call takes longer than `timeout_s`.
        adapter: whose convention the function follows; `auto` looks at the names of its parameters.
    Raises:
        ConfigError: there is no such function, or its arguments do not fit.
    """
    args = dict(args or {})
    if clash := set(args) & _OWN_ARGUMENTS:
        raise ConfigError(f"reward {function!r}: args may not set {sorted(clash)}; each call brings its own")
    settings = {"weight": weight, "policy": policy or FailurePolicy()}
    name = name or default_name(function)
    if is_http(function):
        from rlhf_ray.rewards.http_client import HttpReward

        try:
            return RewardFunction(name, HttpReward(function, timeout_s=timeout_s, **args), **settings)
        except TypeError as error:
            raise ConfigError(
                f"reward {redacted(function)}: {error}; its args are batch_size and connections"
            ) from error
    if not isolated:
        return replace(bind(function, adapter, args), name=name, timeout_s=timeout_s, **settings)
    if is_builtin(function):
        check_builtin(function)
    return RewardFunction(name, IsolatedFunction(function, adapter, args, timeout_s), **settings)


def reward_of(config: RewardConfig) -> RewardFunction:
    """The function of one entry of a config's `rewards`. Raises ConfigError."""
    isolated = config.isolated
    if isolated is None:
        here = is_builtin(config.function) or is_http(config.function) or isinstance(config.function, GivenFunction)
        isolated = not here
    retries = config.retries if config.retries is not None else 2 * (config.on_failure == "retry")
    args = {**config.args, **({"token_env": config.token_env} if config.token_env else {})}
    return load_reward(
        config.function, weight=config.weight, args=args, name=config.name, isolated=isolated,
        timeout_s=config.timeout_s, adapter=config.adapter,
        policy=FailurePolicy(config.on_failure, retries, config.default_score),
    )  # fmt: skip


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
        groups: Sequence[Any] | None = None,
        *,
        others_judge: bool = False,
        first: int = 0,
    ) -> Rewards:
        """Weighted sums and each function's unweighted scores. Async and isolated functions run side by side.

        A function that gives None for a row is no part of that row's sum. A row for which every function gives None is
        a failure of each of them, unless `others_judge`: then its sum is 0.

        Args:
            columns: one mapping a row; a function receives each column as a list, None where a row lacks it.
            groups: [B] rows with equal labels answer the same prompt; default: rows with equal prompts.
            others_judge: something else (a reward model) scores every row.
            first: the place of the first row among those that people know of, for what is said of rows.
        Raises:
            RewardError: names function and row, where a function failed and its policy is to raise.
        """
        groups = list(prompts if groups is None else groups)
        outcomes = self._outcomes(_inputs(prompts, completions, completion_ids, columns), groups, others_judge)
        events = [event for name, outcome in outcomes.items() for event in self._apply_policy(name, outcome, first)]
        scores = {name: _filled(outcome, self.functions[name].policy) for name, outcome in outcomes.items()}
        total = [
            sum(f.weight * scores[name][row] for name, f in self.functions.items() if outcomes[name].judged(row))
            for row in range(len(groups))
        ]
        lost = {group for group, value in zip(groups, total, strict=True) if math.isnan(value)}
        defaulted = sum(event["rows"] for event in events if event["action"] == "default")
        stats = {
            "fault/retries": float(sum(outcome.retries for outcome in outcomes.values())),
            "fault/dropped": float(len(lost)),
            **({"fault/defaulted": float(defaulted)} if defaulted else {}),
        }
        return Rewards([float(value) for value in total], scores, [g not in lost for g in groups], stats, events)

    def close(self) -> None:
        """End the processes of isolated functions."""
        for function in self.functions.values():
            function.close()

    def _outcomes(self, inputs: Inputs, groups: Sequence[Any], others_judge: bool) -> dict[str, Outcome]:
        # Kept apart from `outcomes`: when one function is asked again, a row that nobody judged may become its own.
        found = self._called(dict.fromkeys(self.functions, inputs))
        outcomes = self._seen_together(found, len(groups), others_judge)
        most = max((function.policy.retries for function in self.functions.values()), default=0)
        for attempt in range(most):
            again = {
                name: _rows_of_failed_groups(outcome, groups)
                for name, outcome in outcomes.items()
                if outcome.failures and attempt < self.functions[name].policy.retries
            }
            if not again:
                break
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
            repeated = self._called({name: _selected(inputs, rows) for name, rows in again.items()})
            found |= {name: outcomes[name].mended(again[name], repeated[name]) for name in again}
            outcomes = self._seen_together(found, len(groups), others_judge)
        return outcomes

    def _seen_together(self, found: Mapping[str, Outcome], rows: int, others_judge: bool) -> dict[str, Outcome]:
        """With the failures that no function shows alone: sums that are too large, rows that nobody judged."""
        outcomes = too_large(found, {name: function.weight for name, function in self.functions.items()}, rows)
        return outcomes if others_judge else unjudged(outcomes, rows)

    def _called(self, work: Mapping[str, Inputs]) -> dict[str, Outcome]:
        returned = {name: start(self.functions[name], inputs) for name, inputs in work.items()}
        waiting = {name: value for name, value in returned.items() if not isinstance(value, Outcome)}
        return {**returned, **dict(zip(waiting, together(list(waiting.values())), strict=True))}

    def _apply_policy(self, name: str, outcome: Outcome, first: int) -> list[dict[str, Any]]:
        """What to write into events.jsonl. Raises RewardError if the policy says so."""
        policy = self.functions[name].policy
        if not outcome.failures:
            reason = f"reward {name!r} answered when it was asked again"
            mended = {"reward": name, "action": "retry", "rows": 0, "retries": outcome.retries, "reason": reason}
            return [mended] if outcome.retries else []
        row, failure = next(iter(outcome.failures.items()))
        if policy.on_failure in ("raise", "retry"):
            raise RewardError(failure.message(name, first + row, outcome.retries)) from outcome.cause
        return [{
            "reward": name, "action": policy.on_failure, "rows": len(outcome.failures), "retries": outcome.retries,
            "reason": failure.message(name, first + row),
        }]  # fmt: skip


def _inputs(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Sequence[Mapping[str, Any]],
) -> Inputs:
    names = dict.fromkeys(key for row in columns for key in row if key not in _OWN_ARGUMENTS)
    return {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        **{key: [row.get(key) for row in columns] for key in names},
    }


def _rows_of_failed_groups(outcome: Outcome, groups: Sequence[Any]) -> list[int]:
    """Whole groups: a function may compare the answers to one prompt with each other."""
    failed = {groups[row] for row in outcome.failures}
    return [row for row, group in enumerate(groups) if group in failed]


def _selected(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    return {name: [values[row] for row in rows] for name, values in inputs.items()}


def _filled(outcome: Outcome, policy: FailurePolicy) -> list[float]:
    default = policy.default_score if policy.on_failure == "default" else math.nan
    values = [math.nan if value is None else value for value in outcome.values]
    for row in outcome.failures:
        values[row] = default
    return values
