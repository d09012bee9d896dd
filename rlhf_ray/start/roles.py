"""The roles of an RL run, opened where its config places them: in this process, or on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.models.flops import device_name
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.factory import Assets, Rank
from rlhf_ray.roles.makers import Makers
from rlhf_ray.roles.protocols import Roles
from rlhf_ray.roles.reference import AdapterFreeReference
from rlhf_ray.roles.sft_term import SFTRows


@contextmanager
def open_roles(
    config: RunConfig, assets: Assets, sft: SFTRows | None, note: Callable[[str], None],
    fault: Callable[[str, str, str], None] | None = None,
) -> Iterator[Roles]:  # fmt: skip
    """The roles as this config places them; closed at the end, also after an error. `note` hears what it waits for,
    `fault` (kind, worker, text), in another thread, of workers that are lost and replaced; without it `note` does."""
    if config.executor == "ray":
        from rlhf_ray.remote.roles import open_remote_roles

        with open_remote_roles(config, assets, sft, note, fault or (lambda kind, worker, text: note(text))) as roles:
            yield roles
        return
    transport = "in_process" if config.sync.transport == "auto" else config.sync.transport
    began = time.monotonic()
    engine = config.generator.engine
    if config.generator.facts.slow_start:
        note(f"loading the generator ({engine})")
    makers = Makers.of(config, assets, transport)
    generator = makers.generator()
    if config.generator.facts.slow_start:
        note(f"the generator ({engine}) is ready in {time.monotonic() - began:.0f} s")
    try:
        alone = Rank(deadline_s=config.ray.call_deadline_s)
        learner = makers.learner(sft, alone)
        learner.connect(generator)
        own_reference = AdapterFreeReference(learner) if config.uses_reference else None
        yield Roles(
            generator=generator,
            reward=makers.reward(alone),
            learner=learner,
            advantages=AdvantageEstimator(config.algorithm),
            reference=makers.reference(alone) if makers.reference else own_reference,
            critic=makers.critic(alone) if makers.critic else None,
            replicas=(generator,),
            device_name=device_name(assets.hardware.device),
        )
    finally:
        generator.close()
