"""Which part of a run's config each role is made from: for this process, and for the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.roles import factory
from rlhf_ray.roles.factory import Assets, Course, GeneratorUse, Rank, Sending

if TYPE_CHECKING:
    from rlhf_ray.roles.critic import Critic
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.roles.protocols import Generator
    from rlhf_ray.roles.reference import Reference
    from rlhf_ray.roles.reward import Reward
    from rlhf_ray.roles.sft_term import SFTRows


@dataclass(frozen=True)
class Makers:
    """Calls that make the roles of one run. Each can be pickled, and imports its role's libraries when it is called.

    Attributes:
        learner: takes the rows of sft_data, if there are any, and a rank.
        critic: takes a rank; None where the advantage needs no critic.
        reward: takes a rank.
        reference: takes a rank; None where no model of its own is the reference.
    """

    generator: Callable[[], Generator]
    reward: Callable[[Rank], Reward]
    learner: Callable[[SFTRows | None, Rank], Learner]
    critic: Callable[[Rank], Critic] | None = None
    reference: Callable[[Rank], Reference] | None = None

    @classmethod
    def of(cls, config: RunConfig, assets: Assets, transport: str, *, keep: bool = False) -> Makers:
        """`transport`: how weights go from the learner to the generators; `auto` is none. `keep`: what it sent last can
        be sent again."""
        generator, rollout = config.generator, config.rollout
        use = GeneratorUse(transport, config.longest_sequence, shares_gpu=config.ray.colocate)
        course = Course(config.seed, config.steps)
        # While only the critic learns, the policy's learning rate waits.
        own_course = Course(config.seed, config.steps, config.critic.warmup_steps if config.uses_critic else 0)
        sending = Sending(transport, config.sync.bucket_mb, generator.count * generator.tensor_parallel, keep)
        return cls(
            generator=partial(factory.make_generator, generator, assets, use),
            reward=partial(factory.make_reward, config.judging, assets),
            learner=partial(
                factory.make_learner, config.learner, assets, config.algorithm, rollout, config.model.lora, own_course,
                sending,
            ),
            critic=partial(factory.make_critic, config.critic, assets, course) if config.uses_critic else None,
            reference=partial(factory.make_reference, config.learner, assets, rollout.temperature)
            if config.holds_reference else None,
        )  # fmt: skip
