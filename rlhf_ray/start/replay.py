"""A step that a run has kept as bad, computed again: from the run's directory to what in the step is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.devices import choose_hardware
from rlhf_ray.roles.examine import Examined, columns_of, examine, forward_of
from rlhf_ray.roles.factory import Assets, Rank
from rlhf_ray.roles.makers import Makers
from rlhf_ray.run.bad_steps import FOLDER, BadStep
from rlhf_ray.run.checkpoint import MANIFEST, Checkpoints
from rlhf_ray.start.hardware import own_hardware
from rlhf_ray.start.warm_start import starting_policy

Note = Callable[[str], None]
# However often a step is skipped here, the replay goes on to its end.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Replayed:
    """What was found. `weights` says whose; `roles`: in each that learns, by name."""

    step: BadStep
    weights: str
    roles: dict[str, Examined]

    @property
    def finite(self) -> bool:
        return all(examined.finite for examined in self.roles.values())


def replay(folder: Path, overrides: Sequence[str] = (), weights: Path | None = None, note: Note = print) -> Replayed:
    """The step kept in `folder`, computed again in this process, with its run's settings and the overrides.

    Args:
        weights: a checkpoint, or a model's folder; None: the newest checkpoint before the step, or what comes nearest.
    Raises:
        RlhfRayError: the folder, the run that it lies in, or the weights cannot be used.
    """
    bad = BadStep.read(folder)
    run = folder.resolve().parent.parent
    settings = run / "config.yaml"
    if not settings.is_file():
        raise ConfigError(
            f"{folder}: the settings of its run are not there ({settings}); leave the folder where it was written, in "
            f"RUN/{FOLDER}"
        )
    config = load_config(settings, overrides)
    hardware = choose_hardware(config.device, config.dtype)
    policy, tokenizer = starting_policy(config, run / "start", own_hardware(hardware), lambda step, loss: None, note)
    checkpoint = None
    if weights is None or (weights / MANIFEST).is_file():
        checkpoint = _checkpoint(run / "checkpoints", bad.step, weights)
    else:
        policy = str(weights)
    assets = Assets(policy, tokenizer, hardware, config.model.trust_remote_code)
    makers = Makers.of(_alone(config), assets, "in_process")
    said = policy if checkpoint is None else str(checkpoint)
    note(f"step {bad.step} ({bad.why}), with the weights of {said}")
    return Replayed(bad, said, _examined(config, makers, bad, checkpoint))


def _examined(config: RunConfig, makers: Makers, bad: BadStep, checkpoint: Path | None) -> dict[str, Examined]:
    index, batch, found = bad.step - 1, bad.batch, {}
    given = columns_of(batch)
    if makers.critic is not None and batch.returns is not None:
        critic = makers.critic(Rank())
        if checkpoint is not None:
            critic.load(checkpoint / "critic")
        computed = examine(critic, batch, critic.loss, critic.learning_rate(index), config.critic.world_size)
        found["critic"] = Examined((), *computed)
    if makers.critic is None or index >= config.critic.warmup_steps:
        learner = makers.learner(None, Rank())
        if checkpoint is not None:
            learner.load(checkpoint / "learner")
        given += forward_of(batch, learner.logprobs(batch))
        loss = learner.loss_of(index, bad.kl_coef)
        computed = examine(learner, batch, loss, learner.learning_rate(index), config.learner.world_size)
        found["learner"] = Examined((), *computed)
    return {"batch": Examined(tuple(given), (), ()), **found}


def _alone(config: RunConfig) -> RunConfig:
    """The settings of a single process."""
    own = {"engine": "torch", "world_size": 1, "max_skipped_steps": _NO_LIMIT}
    sections = {name: getattr(config, name).model_copy(update=own) for name in ("learner", "critic")}
    return config.model_copy(update=sections)


def _checkpoint(folder: Path, step: int, given: Path | None) -> Path | None:
    """The given one, or else the newest whole one before the step, or the first after it; None where there is none."""
    checkpoints = Checkpoints(folder)
    if given is not None:
        return checkpoints.load(given)[1]
    steps = checkpoints.steps()
    for number in [*reversed([s for s in steps if s < step]), *(s for s in steps if s >= step)]:
        try:
            return checkpoints.load(folder / f"step_{number}")[1]
        except CheckpointError as error:
            warnings.warn(f"{error}; another one is taken", stacklevel=2)
    return None
