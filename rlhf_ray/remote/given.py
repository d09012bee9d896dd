"""Reward functions of the driver's program, which travel to the reward worker as copies."""

from __future__ import annotations

from collections.abc import Sequence

from ray import cloudpickle

from rlhf_ray.config.given import GivenFunction
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.errors import ConfigError


def require_portable(rewards: Sequence[RewardConfig]) -> None:
    """Raises ConfigError for a function that cannot be copied: Ray would say so of a call that nobody knows."""
    for reward in rewards:
        if not isinstance(reward.function, GivenFunction):
            continue
        try:
            cloudpickle.dumps(reward)
        except Exception as error:  # whatever the objects that it holds raise
            raise ConfigError(
                f"reward {reward.label}: executor=ray sends it to a worker, and it cannot be pickled "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); make what it holds inside of the "
                "function, put it into a file and name it file.py:function, or set executor=local"
            ) from error
