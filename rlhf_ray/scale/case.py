"""What is planned: a run's settings, its models' sizes, and the devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import TrainEngineConfig
from rlhf_ray.models.architecture import Architecture
from rlhf_ray.models.size import Size
from rlhf_ray.scale.devices import GIB, Device
from rlhf_ray.scale.layout import Layout
from rlhf_ray.scale.rates import Rates

# A machine's memory, where nobody says it: machines with 8 large GPUs are sold with about 2 TiB.
HOST_GIB_A_DEVICE = 256


@dataclass(frozen=True)
class Case:
    """Attributes:
    policy, shape: parameters, and what memory follows from besides.
    critic: its parameters; None where there is none.
    judges: parameters of the networks that judge: reward model, safety classifier, local judge.
    devices: how many there are.
    given_host_memory: bytes of each machine; None: nobody says.
    prompt_tokens, answer_tokens: means; memory is planned for the longest.
    """

    config: RunConfig
    policy: Size
    shape: Architecture
    device: Device
    devices: int
    given_host_memory: int | None
    rates: Rates
    prompt_tokens: float
    answer_tokens: float
    dtype: torch.dtype = torch.bfloat16
    critic: Size | None = None
    judges: int = 0

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.device.in_a_node)

    @property
    def host_memory(self) -> int:
        """Bytes of each machine, or of the share of one that so many devices come with."""
        return self.given_host_memory or HOST_GIB_A_DEVICE * min(self.device.in_a_node, self.devices) * GIB

    @property
    def rows(self) -> int:
        return self.config.samples_per_step

    @property
    def longest(self) -> int:
        return self.config.longest_sequence

    @property
    def tokens(self) -> float:
        """Of a step: prompts and answers."""
        return self.rows * (self.prompt_tokens + self.answer_tokens)

    def training(self, layout: Layout, name: str) -> TrainEngineConfig:
        """Section `name` (learner, critic) in this layout."""
        section: TrainEngineConfig = getattr(self.config, name)
        return section.model_copy(update=layout.section(name))
