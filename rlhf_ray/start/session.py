"""The roles of an `rl` run without its loop, for those who write a loop of their own (docs/python.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.clock import at_moment
from rlhf_ray.config.load import on_device, validated
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.turn_end import with_turn_ends
from rlhf_ray.loops.export import export
from rlhf_ray.models.loading import stop_token_ids
from rlhf_ray.roles.factory import Assets
from rlhf_ray.roles.protocols import Roles, Sampling
from rlhf_ray.roles.requests import Requests
from rlhf_ray.rollout.choose import Asking
from rlhf_ray.start.hardware import hardware_of, own_hardware
from rlhf_ray.start.rl import sampling_of
from rlhf_ray.start.rl_inputs import check_inputs
from rlhf_ray.start.roles import open_roles
from rlhf_ray.start.warm_start import starting_policy


@dataclass(frozen=True)
class Session:
    """Roles that are open, and what the loop of a run would ask them.

    Attributes:
        config: the settings, as they hold on this device.
        roles: `generator`, `reward`, `learner`, `advantages`, and `reference` and `critic` where the algorithm has
            them: objects of this process, or handles to a cluster's workers (rlhf_ray/roles/protocols.py).
        prompts: to learn from.
        held_out: those kept apart.
        sampling: how answers are drawn.
    """

    config: RunConfig
    roles: Roles
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    held_out: PromptSet
    sampling: Sampling

    def requests(self, step: int) -> Requests:
        """What the run of this config would ask its generator at a step, from 0: `rollout.prompts_per_step` prompts,
        `rollout.group_size` times each, one prompt's behind each other. A function of seed and step alone."""
        config = self.config
        asking = Asking(self.prompts, config.rollout, config.algorithm, seed=config.seed, steps=config.steps)
        first = step * config.rollout.prompts_per_step
        return asking.requests(range(first, first + config.rollout.prompts_per_step), step)

    def export(self, folder: str | Path) -> Path:
        """Write the policy as a Hugging Face folder, and return that. Raises StorageError."""
        export(self.roles.learner, Path(folder), None)
        return Path(folder)


@contextmanager
def open_session(config: RunConfig, folder: str | Path | None, note: Callable[[str], None]) -> Iterator[Session]:
    """The roles as the config places them; closed at the end, also after an error.

    Args:
        folder: for the policy to start from, where one has to be made (`scratch:`, a warm start, a model object); the
            workers of a cluster must be able to read it. None: a temporary one of this machine.
        note: hears what is loaded.
    Raises:
        RlhfRayError: what a run of this config would raise before its first step.
    """
    config = validated(config)
    hardware = hardware_of(config)
    config = at_moment(on_device(config, hardware.device), datetime.now().replace(microsecond=0))
    trust = config.model.trust_remote_code
    with TemporaryDirectory(prefix="rlhf_ray_") as temporary:
        start = Path(temporary if folder is None else folder) / "start"
        tokenizer, prompts, held_out, sft = check_inputs(config, start, hardware.device)
        policy, tokenizer_path = starting_policy(
            config, start, own_hardware(hardware), on_step=lambda step, loss: None, note=note
        )
        stop = with_turn_ends(stop_token_ids(policy, tokenizer, trust_remote_code=trust), tokenizer)
        assets = Assets(policy, tokenizer_path, hardware, trust)
        with open_roles(config, assets, sft.rows if sft else None, note) as roles:
            yield Session(config, roles, tokenizer, prompts, held_out, sampling_of(config.rollout, stop))
