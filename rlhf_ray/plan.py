"""What a run needs, before anything starts: which role runs where, and how much memory it takes.

The models are built on the meta device (shapes without numbers), so this costs no memory and no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import rlhf_ray.models.lstm  # noqa: F401  registers the LSTM with AutoConfig
from rlhf_ray.config.schema import LoraConfig, RunConfig, TrainEngineConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.warm_start import make_tokenizer
from rlhf_ray.models.devices import Hardware, choose_hardware
from rlhf_ray.models.scratch import build_scratch

Kind = Literal["policy", "classifier"]
ADAM_BYTES = 8  # two moments a trained parameter, float32
MASTER_BYTES = 4  # gradients, and the float32 copy of weights that are computed with in bfloat16


@dataclass(frozen=True)
class Size:
    """Parameters of a model, and how many of them are trained."""

    parameters: int
    trained: int

    @property
    def base(self) -> int:
        """Without the adapters."""
        return self.parameters - self.trained if self.trained < self.parameters else self.parameters


@dataclass(frozen=True)
class PlannedRole:
    """`bytes` is what one process needs, besides activations; None where the model's size is unknown."""

    name: str
    engine: str
    processes: int
    devices: int  # of one process
    bytes: int | None


def describe_plan(config: RunConfig) -> str:
    """The placement and the memory estimate, for people."""
    hardware, found = expected_hardware(config)
    policy = model_size(config)
    lines = [f"# placement: executor {config.executor}, device {hardware.device}, {_dtype_name(hardware)}{found}"]
    if policy is None:
        lines.append(f"# policy {config.model.path}: size unknown (not in the local cache; nothing is downloaded here)")
    else:
        lora = f", of which LoRA trains {policy.trained:,}" if policy.trained < policy.parameters else ""
        lines.append(f"# policy {config.model.path}: {policy.parameters:,} parameters{lora}")
    for role in planned_roles(config, hardware, policy):
        count = f"{role.processes} x {role.devices} {hardware.device}" if role.devices > 1 else f"{role.processes}"
        lines.append(f"#   {role.name:<10} {role.engine:<16} processes: {count:<9} memory each: {human(role.bytes)}")
    if config.executor == "local":
        lines.append("#   (local: all roles share one process and one device)")
    lines.append(
        "# memory: weights, gradients and optimiser state. Activations come on top (learner.tokens_per_microbatch sets "
        "them), and the generator's KV cache"
    )
    return "\n".join(lines)


def planned_roles(config: RunConfig, hardware: Hardware, policy: Size | None) -> list[PlannedRole]:
    """Every role with its processes; the ones that this run does not use are not there."""
    generator, width = config.generator, hardware.dtype.itemsize
    weights = None if policy is None else policy.parameters * width
    shard = None if weights is None else weights // generator.tensor_parallel
    roles = [
        PlannedRole("generator", generator.engine, generator.count, generator.tensor_parallel, shard),
        _trainer("learner", config.learner, hardware, policy),
    ]
    if config.uses_reference:
        roles.append(PlannedRole("reference", "hf", 1, 1, weights))
    if config.uses_critic:
        size = policy and Size(policy.base, policy.base)  # LoRA is the policy's alone
        if config.critic.path is not None:
            size = saved_size(config.critic.path, "policy")
        roles.append(_trainer("critic", config.critic, hardware, size))
    judge = None
    if config.reward_model is not None:
        size = saved_size(config.reward_model.path, "classifier")
        judge = None if size is None else size.parameters * width
    roles.append(PlannedRole("reward", "model" if config.reward_model else "functions", 1, 1,
                             judge if config.reward_model else 0))  # fmt: skip
    return roles


def train_bytes(size: Size, settings: TrainEngineConfig, dtype: torch.dtype) -> int:
    """Bytes that one rank of a training engine needs, besides activations.

    ZeRO (Rajbhandari et al. 2020, figure 1): stage 1 shards the optimiser state, 2 the gradients too, 3 the weights
    too. What is offloaded lies in host memory and is not counted.
    """
    ranks = settings.world_size
    stage = settings.zero_stage if settings.engine == "deepspeed" else 0
    weights, gradients = size.parameters * dtype.itemsize, size.trained * MASTER_BYTES
    # DeepSpeed keeps masters in float32 runs as well.
    masters = size.trained * MASTER_BYTES if dtype != torch.float32 or settings.engine == "deepspeed" else 0
    optimiser = size.trained * ADAM_BYTES + masters
    if settings.offload != "none":
        optimiser = 0
    if settings.offload == "parameters":
        weights = 0
    return (
        weights // (ranks if stage == 3 else 1)
        + gradients // (ranks if stage >= 2 else 1)
        + optimiser // (ranks if stage >= 1 else 1)
    )


def _trainer(name: str, settings: TrainEngineConfig, hardware: Hardware, size: Size | None) -> PlannedRole:
    engine = settings.engine if settings.engine == "torch" else f"deepspeed ZeRO-{settings.zero_stage}"
    held = None if size is None else train_bytes(size, settings, hardware.dtype)
    return PlannedRole(name, engine, settings.world_size, 1, held)


def expected_hardware(config: RunConfig) -> tuple[Hardware, str]:
    """The device of the run, and a remark: a plan for a cluster may be made on a machine without its GPUs."""
    try:
        return choose_hardware(config.device, config.dtype), ""
    except ConfigError as error:
        if config.device == "auto" or "dtype" in str(error):
            raise
        cuda, mps = config.device == "cuda", config.device == "mps"
        return choose_hardware(config.device, config.dtype, cuda=cuda, mps=mps), f" (not on this machine: {error})"


def model_size(config: RunConfig) -> Size | None:
    """Size of the policy this config describes; None if it lies on the Hub and not in the cache."""
    if not config.model.path.startswith("scratch:"):
        return saved_size(config.model.path, "policy", config.model.lora)
    kind, vocab_size = config.model.path.removeprefix("scratch:"), _vocab_size(config)
    with torch.device("meta"):
        model = build_scratch(kind, vocab_size=vocab_size, **config.model.scratch.model_dump())
    return _size_of(model, config.model.lora)


def saved_size(path: str, kind: Kind, lora: LoraConfig | None = None) -> Size | None:
    """Size of a model in a folder or in the local Hub cache; None where there is none."""
    factory = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    try:
        shape = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return _size_of(factory.from_config(shape), lora)
    except (OSError, ValueError, KeyError):
        return None


def _vocab_size(config: RunConfig) -> int:
    # word and bpe learn their words from the data: the bound is near enough, and costs no reading.
    learned = config.model.tokenizer.path in ("scratch:word", "scratch:bpe")
    return config.model.tokenizer.vocab_size if learned else len(make_tokenizer(config))


def _size_of(model: PreTrainedModel, lora: LoraConfig | None) -> Size:
    parameters = sum(p.numel() for p in model.parameters())  # a tied weight comes once
    if lora is None:
        return Size(parameters, parameters)
    adapters = sum(lora.r * sum(layer.weight.shape) for layer in _adapted(model, lora))
    return Size(parameters + adapters, adapters)


def _adapted(model: PreTrainedModel, lora: LoraConfig) -> list[nn.Module]:
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    if lora.target_modules == "all-linear":
        return list(linear.values())
    wanted = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    return [module for name, module in linear.items() if name.rpartition(".")[2] in wanted]


def human(count: int | None) -> str:
    """Bytes in units of 1024."""
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _dtype_name(hardware: Hardware) -> str:
    return str(hardware.dtype).removeprefix("torch.")
