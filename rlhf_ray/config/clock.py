"""The moment that chat templates take for now: put into every section whose templates may ask for today's date."""

from __future__ import annotations

from datetime import datetime
from typing import TypeVar

from rlhf_ray.config.evaluation import SampledRunConfig
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import TrainingRunConfig

Dated = TypeVar("Dated", bound=TrainingRunConfig | SampledRunConfig)


def at_moment(config: Dated, moment: datetime) -> Dated:
    """`config` with its clock at `moment`, and those of its local AI judges: they render prompts of their own.

    A clock that is set already stays.
    """
    moment = config.clock or moment
    changes: dict[str, object] = {"clock": moment}
    if isinstance(config, RunConfig | SampledRunConfig):
        changes["rewards"] = [_reward_at(reward, moment) for reward in config.rewards]
    if isinstance(config, SampledRunConfig) and config.judge is not None:
        changes["judge"] = config.judge.model_copy(update={"clock": config.judge.clock or moment})
    return config.model_copy(update=changes)


def _reward_at(reward: RewardConfig, moment: datetime) -> RewardConfig:
    if reward.function != "judge" or reward.args.get("endpoint") is not None:
        return reward  # an endpoint has its own template, and its own clock
    return reward.model_copy(update={"args": {"clock": moment.isoformat(), **reward.args}})
