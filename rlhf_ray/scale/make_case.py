"""From a run's settings and what the command line says of devices to what is planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.architecture import Architecture
from rlhf_ray.models.size import Size, saved_size, size_of
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.devices import GIB, Device, find_device
from rlhf_ray.scale.rates import read_rates
from rlhf_ray.scale.shapes import require_shape


@dataclass(frozen=True)
class Wishes:
    """What the command line says. Memory in GiB; None: as the device's data sheet, or the default, has it.

    Attributes:
        nodes: machines, among which the devices are divided evenly.
        prompt_tokens, answer_tokens: means; None: as long as the settings allow.
    """

    device: str
    devices: int
    nodes: int | None = None
    memory: float | None = None
    host_memory: float | None = None
    rates: Path | None = None
    prompt_tokens: float | None = None
    answer_tokens: float | None = None


def make_case(config: RunConfig, shape: PreTrainedConfig, policy: Size, wishes: Wishes) -> Case:
    """Raises ConfigError, ModelError: an unknown device, model or rate; lengths that the settings do not allow."""
    device = _device(wishes)
    limits = {"prompt": config.data.max_prompt_tokens, "answer": config.rollout.max_new_tokens}
    means = {"prompt": wishes.prompt_tokens, "answer": wishes.answer_tokens}
    for name, mean in means.items():
        if mean is not None and not 0 < mean <= limits[name]:
            setting = "data.max_prompt_tokens" if name == "prompt" else "rollout.max_new_tokens"
            raise ConfigError(
                f"--{name}-tokens {mean:g} is a mean, and {setting} allows 1 to {limits[name]}; change one"
            )
    host = None if wishes.host_memory is None else int(wishes.host_memory * GIB)
    return Case(
        config, policy, Architecture.of(shape, config.model.path), device, wishes.devices, host,
        read_rates(wishes.rates), means["prompt"] or limits["prompt"], means["answer"] or limits["answer"],
        torch.float32 if config.dtype == "float32" else torch.bfloat16, _critic(config, policy), _judges(config),
    )  # fmt: skip


def _device(wishes: Wishes) -> Device:
    device = find_device(wishes.device)
    if wishes.memory is not None:
        device = replace(device, memory=int(wishes.memory * GIB))
    if wishes.nodes is not None:
        if wishes.devices % wishes.nodes:
            raise ConfigError(
                f"--nodes {wishes.nodes} does not divide --devices {wishes.devices}; give machines of one size"
            )
        device = replace(device, in_a_node=wishes.devices // wishes.nodes)
    return device


def size_of_shape(shape: PreTrainedConfig, lora: LoraConfig | None = None) -> Size:
    """Counted on the meta device."""
    with torch.device("meta"):
        return size_of(AutoModelForCausalLM.from_config(shape), lora)


def _critic(config: RunConfig, policy: Size) -> Size | None:
    if not config.uses_critic:
        return None
    size = Size(policy.base, policy.base)  # LoRA is the policy's alone
    return size if config.critic.path is None else _known(config.critic.path, "policy")


def _judges(config: RunConfig) -> int:
    """Parameters of all networks that judge. A local judge's model is among the rewards' own arguments: unknown."""
    return sum(_known(path, "classifier").parameters for path in config.judging.networks)


def _known(path: str, kind: str) -> Size:
    """Of a model that is here, or whose name says its shape."""
    size = saved_size(path, kind)
    return size or size_of_shape(require_shape(path, f"the size of {path} is unknown, for it is not on this machine"))
