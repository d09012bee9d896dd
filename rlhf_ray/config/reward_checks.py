"""Settings of one reward that contradict each other, each with what, why and what to do."""

from __future__ import annotations

from urllib.parse import urlsplit

from rlhf_ray.config.given import GivenFunction
from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.rewards import RewardConfig


def failure_problems(reward: RewardConfig, key: str) -> list[str]:
    """What is to happen when it fails, and how it is called. `key`: where it stands in the config."""
    problems = []
    if reward.on_failure == "default" and reward.default_score is None:
        problems.append(
            f"{key}.on_failure=default gives rows without a score {key}.default_score, which is empty; set it, "
            "or choose raise, retry or drop_group"
        )
    if reward.on_failure != "default" and reward.default_score is not None:
        problems.append(
            f"{key}.default_score={reward.default_score:g} would never be given, for {key}.on_failure="
            f"{reward.on_failure}; set on_failure=default, or remove default_score"
        )
    given = abs(reward.weight * (reward.default_score or 0.0))
    if given > LARGEST_REWARD:
        problems.append(
            f"{key}.default_score={reward.default_score:g} times {key}.weight={reward.weight:g} is beyond "
            f"{LARGEST_REWARD:g}, where float32's sums of squares end; lower one of them"
        )
    if reward.on_failure == "retry" and reward.retries == 0:
        problems.append(
            f"{key}.on_failure=retry with {key}.retries=0 never asks again; set retries, or on_failure=raise"
        )
    return problems + _calling_problems(reward, key)


def _calling_problems(reward: RewardConfig, key: str) -> list[str]:
    problems = []
    is_server = reward.function.startswith(("http://", "https://"))
    if is_server and (reward.isolated or reward.adapter != "auto"):
        problems.append(
            f"{key}.isolated and {key}.adapter are for functions, and {reward.function} is a server; remove them"
        )
    if is_server and not _has_port(reward.function):
        problems.append(
            f"{key}.function: what stands for the port in this URL is no number; write a / ? # or @ in a password as "
            "%2F %3F %23 %40, or use token_env"
        )
    if reward.isolated and isinstance(reward.function, GivenFunction):
        problems.append(
            f"{key}.isolated: another process could not import {reward.label}, a function that was given from Python; "
            "remove it, or put the function into a file and name it file.py:function"
        )
    if reward.token_env and not is_server:
        problems.append(f"{key}.token_env is for reward servers, and {reward.function} is a function; remove it")
    return problems


def _has_port(url: str) -> bool:
    """Whether the URL's port can be read, or is left out."""
    try:
        urlsplit(url).port  # noqa: B018  raises where it is no number
    except ValueError:
        return False
    return True
