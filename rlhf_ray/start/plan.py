"""What a run needs, before anything starts: which role runs where, and how much memory it takes.

The models are built on the meta device (shapes without numbers), so this costs no memory and no download.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_ray.config.load import on_device
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import TrainEngineConfig, TrainingRunConfig
from rlhf_ray.config.sources import SeveralSources
from rlhf_ray.config.supervised import ClassifierConfig, RMConfig, SupervisedConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.devices import Hardware, choose_hardware
from rlhf_ray.models.loading import local_folder
from rlhf_ray.models.memory import train_bytes
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.size import Size, saved_size, size_of
from rlhf_ray.start.supervised_inputs import build_model
from rlhf_ray.start.warm_start import make_tokenizer


@dataclass(frozen=True)
class PlannedRole:
    """`bytes` is what one process needs, besides activations; None where the model's size is unknown."""

    name: str
    engine: str
    processes: int
    devices: int  # of one process
    bytes: int | None


def describe_plan(config: RunConfig) -> str:
    """The placement and the memory estimate, for people.

    Raises:
        ConfigError: listing what does not fit the device that `auto` stands for here.
    """
    hardware, found = expected_hardware(config)
    config = on_device(config, hardware.device)
    policy = model_size(config)
    lines = [f"# placement: executor {config.executor}, device {hardware}{found}", *_mixture(config.data)]
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
    else:
        lines.append(_on_ray(config, hardware.device))
    lines.append(
        "# memory: weights, gradients and optimiser state. Activations come on top (learner.tokens_per_microbatch sets "
        "them), and the generator's KV cache"
    )
    return "\n".join(lines)


def describe_supervised_plan(config: SupervisedConfig) -> str:
    """The same for SFT, a reward model, DPO or a classifier: one role, the trainer. Raises ConfigError."""
    hardware, found = expected_hardware(config)
    on_device(config, hardware.device)
    judges = isinstance(config, RMConfig | ClassifierConfig)
    if config.model.path.startswith("scratch:"):
        with torch.device("meta"):
            model = build_model(config, ("score",) if judges else (), vocab_size=config.model.tokenizer.vocab_size)
        size: Size | None = size_of(model, config.model.lora)
    else:
        size = saved_size(config.model.path, "classifier" if judges else "policy", config.model.lora)
    trainer = _trainer("trainer", config.learner, hardware, size)
    known = "size unknown (not here yet, or on the Hub; nothing is downloaded here)"
    return "\n".join([
        f"# placement: executor {config.executor}, device {hardware}{found}",
        *_mixture(config.data),
        f"# model {config.model.path}: {known if size is None else f'{size.parameters:,} parameters at most'}",
        f"#   {trainer.name:<10} {trainer.engine:<16} processes: {trainer.processes:<9} "
        f"memory each: {human(trainer.bytes)}",
        "# memory: weights, gradients and optimiser state. Activations come on top (learner.tokens_per_microbatch)",
    ])  # fmt: skip


def _mixture(data: SeveralSources) -> list[str]:
    """How several sources are mixed, as far as the config alone says it."""
    if len(data.parts) < 2:
        return []
    total = sum(part.weight or 0 for part in data.parts)
    shares = [f"{part.name} {f'{part.weight / total:.1%} ' if total else ''}({part.data.path})" for part in data.parts]
    return [f"# sources: {', '.join(shares)}" + ("" if total else "; no weights, so each row comes once an epoch")]


def _on_ray(config: RunConfig, device: str) -> str:
    """What the run asks of the cluster: the very bundles that it will reserve."""
    try:
        from rlhf_ray.remote.placement import choose_transport, plan_seats
    except ImportError:
        return "#   (ray: not installed here, so its placement is not worked out; pip install 'rlhf-ray[ray]')"
    transport = choose_transport(config.sync, config.generator, config.ray, device)
    plan = plan_seats(config, device, transport)
    wanted = " and ".join(f"{plan.total(kind):g} {kind}s" for kind in ("GPU", "CPU") if plan.total(kind))
    lines = [f"#   ray: {wanted} in {len(plan.bundles)} bundles, each on one machine; weights by {transport}"]
    for number in range(len(plan.bundles)):
        names = [seat.name + (" (shares)" if seat.borrows else "") for seat in plan.seats if seat.bundle == number]
        share = ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(plan.bundles[number].items(), reverse=True))
        lines.append(f"#     {share}: {', '.join(names)}")
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
    if config.holds_reference:
        ranks = config.reference.world_size
        engine, share = ("hf", weights) if ranks == 1 else ("hf ZeRO-3", weights and math.ceil(weights / ranks))
        roles.append(PlannedRole("reference", engine, config.reference.count * ranks, 1, share))
    if config.uses_critic:
        size = policy and Size(policy.base, policy.base)  # LoRA is the policy's alone
        if config.critic.path is not None:
            size = saved_size(config.critic.path, "policy")
        roles.append(_trainer("critic", config.critic, hardware, size))
    judges = [saved_size(path, "classifier") for path in config.judging.networks]
    held = None if None in judges else sum(size.parameters * width for size in judges)
    ranks, kind = config.reward.world_size, "model" if judges else "functions"
    if ranks > 1:
        kind, held = "model ZeRO-3", held and math.ceil(held / ranks)
    return [*roles, PlannedRole("reward", kind, config.reward.count * ranks, 1, held)]


def _trainer(name: str, settings: TrainEngineConfig, hardware: Hardware, size: Size | None) -> PlannedRole:
    engine = f"{settings.engine} ZeRO-{settings.zero_stage}" if settings.facts.shards else settings.engine
    held = None if size is None else train_bytes(size, settings, hardware.dtype)
    return PlannedRole(name, engine, settings.world_size, 1, held)


def expected_hardware(config: TrainingRunConfig) -> tuple[Hardware, str]:
    """The device of the run, and a remark: a plan for a cluster may be made on a machine without its GPUs."""
    try:
        return choose_hardware(config.device, config.dtype), ""
    except ConfigError as error:
        if config.device == "auto" or "dtype" in str(error):
            raise
        cuda, mps = config.device == "cuda", config.device == "mps"
        return choose_hardware(config.device, config.dtype, cuda=cuda, mps=mps), f" (not on this machine: {error})"


def model_size(config: RunConfig) -> Size | None:
    """Size of the policy this config describes; None if it lies on the Hub and not in the cache.

    Raises ModelError for what can only be a folder, and is none.
    """
    if not config.model.path.startswith("scratch:"):
        local_folder(config.model.path)
        return saved_size(config.model.path, "policy", config.model.lora)
    return size_of(_scratch(config), config.model.lora)


def built_shape(config: RunConfig) -> PreTrainedConfig:
    """The config of a policy that is built on the spot."""
    return _scratch(config).config


def _scratch(config: RunConfig) -> PreTrainedModel:
    kind, vocab_size = config.model.path.removeprefix("scratch:"), _vocab_size(config)
    with torch.device("meta"):
        return build_scratch(kind, vocab_size=vocab_size, **config.model.scratch.model_dump())


def _vocab_size(config: RunConfig) -> int:
    # word and bpe learn their words from the data: the bound is near enough, and costs no reading.
    learned = config.model.tokenizer.path in ("scratch:word", "scratch:bpe")
    return config.model.tokenizer.vocab_size if learned else len(make_tokenizer(config))


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
