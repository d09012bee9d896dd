"""What a run costs: its seconds and device-hours over all its parts, and how well they were used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.models.size import Size
from rlhf_ray.roles.batch import Rows
from rlhf_ray.run.directory import RunDirectory

FORWARD = 2  # operations a parameter and token: one multiplication, one addition
TRAIN = 6  # and twice as many for the gradients of activations and of weights (Kaplan et al. 2020, section 2.1)
TRAIN_ADAPTERS = 4  # frozen weights need no gradients of their own


@dataclass(frozen=True)
class Spent:
    """Time that a run has taken so far."""

    seconds: float = 0.0
    device_hours: float = 0.0

    def plus(self, seconds: float, devices: float) -> Spent:
        return Spent(self.seconds + seconds, self.device_hours + devices * seconds / 3600)


def spent_before(directory: RunDirectory) -> Spent:
    """What the earlier parts of a resumed run took, as far as they could still write it down.

    Asked before `directory.rewind`: the steps that will be repeated were paid for all the same.
    """
    summary = directory.read_summary()
    seconds, device_hours = [_number(summary, "seconds")], [_number(summary, "device_hours")]
    for row in directory.read_metrics()[-1:]:
        seconds.append(3600 * _number(row, "cost/hours"))
        device_hours.append(_number(row, "cost/device_hours"))
    for event in directory.read_events():  # a part that was killed before its first step
        if event.get("event") in ("resumed", "rewound"):
            seconds.append(_number(event, "seconds"))
            device_hours.append(_number(event, "device_hours"))
    return Spent(max(seconds), max(device_hours))


def _number(found: Mapping[str, Any], name: str) -> float:
    """0 where a damaged file has something else there."""
    value = found.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


@dataclass(frozen=True)
class Passes:
    """How often a step goes over its tokens.

    Attributes:
        forwards: of the policy's size: the generator, the reference, the log-probabilities before the update.
        policy: training passes of the policy.
        critic: of the critic, which gives its values besides; 0 where there is none.
        critic_alone: first steps in which the policy does not learn.
    """

    forwards: int = 1
    policy: int = 1
    critic: int = 0
    critic_alone: int = 0


def passes_a_step(config: RunConfig) -> Passes:
    """Of the run that these settings describe."""
    critic = config.critic if config.uses_critic else None
    return Passes(
        forwards=1 + config.uses_reference + config.uses_old_logprobs,
        policy=config.learner.epochs,
        critic=critic.epochs if critic else 0,
        critic_alone=critic.warmup_steps if critic else 0,
    )


@dataclass(frozen=True)
class Workload:
    """The models that a step computes with, and the devices it has for that.

    Attributes:
        policy, critic: None where the size is not known.
        devices: accelerators that the run occupies; on CPU, machines.
        peak_flops: of one device, FLOP/s; None where it is not known.
    """

    policy: Size | None = None
    critic: Size | None = None
    devices: float = 1.0
    peak_flops: float | None = None
    passes: Passes = Passes()

    def mfu(self, rows: Rows, step: int, seconds: float) -> float | None:
        """Model FLOPs utilisation of step number `step` (from 0): a share of what the devices could have done.

        Counts parameters x tokens, prompts included and padding not: generator and every forward pass 2, training 6
        (4 with LoRA). Attention's quadratic part, the reward model and evaluations are left out.
        """
        if self.policy is None or self.peak_flops is None or (self.passes.critic and self.critic is None):
            return None
        work = self._operations(self.policy, step) * int(rows.lengths.sum())
        return work / (seconds * self.devices * self.peak_flops)

    def _operations(self, policy: Size, step: int) -> float:
        """Of one token of a completion or its prompt."""
        passes = self.passes
        work = float(FORWARD * policy.base * passes.forwards)
        if self.critic is not None and passes.critic:
            work += self.critic.parameters * (FORWARD + TRAIN * passes.critic)
        if step >= passes.critic_alone:
            factor = TRAIN if policy.trained == policy.parameters else TRAIN_ADAPTERS
            work += factor * policy.parameters * passes.policy
        return work
