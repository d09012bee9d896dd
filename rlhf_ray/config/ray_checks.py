"""Where workers run and how weights reach them: settings that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import RayConfig


def transport_problems(config: RunConfig, device: str) -> list[str]:
    transport = config.sync.transport
    if transport == "in_process" and config.executor == "ray":
        return [
            "sync.transport=in_process passes tensors by reference, which ends at a process; "
            "use shared_memory (one host), nccl or cuda_ipc"
        ]
    if transport in ("nccl", "cuda_ipc") and device in ("cpu", "mps"):
        return [f"sync.transport={transport} moves CUDA memory and device={device}; use shared_memory"]
    if transport in ("nccl", "cuda_ipc") and config.executor == "local":
        return [f"sync.transport={transport} connects processes and executor=local is one; use in_process"]
    if transport in ("nccl", "cuda_ipc") and not config.generator.facts.receives_on_gpu:
        return [
            f"sync.transport={transport} ends in vLLM, and generator.engine={config.generator.engine} receives by "
            "shared_memory only; "
            "set sync.transport=shared_memory (or auto), or generator.engine=vllm"
        ]
    if transport == "cuda_ipc" and not config.ray.colocate:
        return [
            "sync.transport=cuda_ipc shares the memory of one GPU, and generator and learner have GPUs of their own; "
            "set ray.colocate=true, or sync.transport=nccl"
        ]
    if transport == "nccl" and config.ray.gpus_per_worker < 1 and not config.ray.colocate:
        return [
            f"sync.transport=nccl cannot have two processes on one GPU, which ray.gpus_per_worker="
            f"{config.ray.gpus_per_worker:g} allows; set it to 1, or sync.transport=shared_memory"
        ]
    if transport == "nccl" and config.ray.colocate:
        return [
            "sync.transport=nccl cannot have two processes on one GPU, which is what ray.colocate means; "
            "set sync.transport=cuda_ipc"
        ]
    return []


def shared_gpu_problems(ray: RayConfig, groups: Mapping[str, int]) -> list[str]:
    """`groups`: setting -> processes that need a GPU each, to talk by NCCL."""
    return [
        f"{name}={processes} is a group that needs whole GPUs, and ray.gpus_per_worker={ray.gpus_per_worker:g} lets "
        f"two of them share one, which NCCL refuses; set it to 1, or {name}=1"
        for name, processes in groups.items()
        if processes > 1 and ray.gpus_per_worker < 1
    ]


def replica_problems(config: RunConfig, device: str) -> list[str]:
    """Workers of a role that stand alone, and share its work."""
    numbers = {
        "reference.count": config.reference.count, "reference.world_size": config.reference.world_size,
        "reward.count": config.reward.count, "reward.world_size": config.reward.world_size,
    }  # fmt: skip
    several = {name: number for name, number in numbers.items() if number > 1}
    problems = []
    if config.executor == "local":
        problems += [
            f"executor=local is one process, {name}={number} is not; set executor=ray or {name}=1"
            for name, number in several.items()
        ]
    if not config.holds_reference:
        reason = "a LoRA policy without its adapter is its own" if config.uses_reference else "algorithm.kl_coef=0"
        problems += [
            f"{name}={number}, and this run holds no reference ({reason}); remove it"
            for name, number in several.items()
            if name.startswith("reference")
        ]
    if config.reward.world_size > 1 and not config.judging.networks:
        problems.append(
            f"reward.world_size={config.reward.world_size} ranks hold reward_model and safety together, and there is "
            "neither; set it to 1, and reward.count for more workers"
        )
    if config.reference.world_size > 1 and config.model.path == "scratch:lstm":
        problems.append(
            f"reference.world_size={config.reference.world_size}: ZeRO-3 cannot take the layers of scratch:lstm apart; "
            "set it to 1"
        )
    if device == "mps":
        problems += [
            f"{name}={number} needs DeepSpeed, which has no MPS backend; set it to 1"
            for name, number in several.items()
            if name.endswith("world_size")
        ]
    return problems


def placement_problems(config: RunConfig, device: str) -> list[str]:
    """On CUDA. Colocated, each GPU belongs to a learner rank, and everybody else borrows it."""
    if config.executor != "ray" or device != "cuda":
        return []
    ranks, each = config.learner.world_size, config.generator.tensor_parallel
    if not config.ray.colocate:
        groups = {"learner.world_size": ranks, "generator.tensor_parallel": each}
        if config.uses_critic:
            groups["critic.world_size"] = config.critic.world_size
        if config.holds_reference:
            groups["reference.world_size"] = config.reference.world_size
        groups["reward.world_size"] = config.reward.world_size
        return shared_gpu_problems(config.ray, groups)
    problems = []
    if config.generator.count * each > ranks or ranks % each:
        problems.append(
            f"ray.colocate: {config.generator.count} generators of {each} GPUs share the GPUs of learner.world_size="
            f"{ranks} ranks, which must be at least as many and a multiple of tensor_parallel; raise "
            "learner.world_size, or lower generator.count or generator.tensor_parallel"
        )
    on_gpus = {
        "reference.count * reference.world_size": config.reference.count * config.reference.world_size,
        "reward.count * reward.world_size": config.reward.count * config.reward.world_size * config.judging.needs_gpu,
    }
    problems += [
        f"ray.colocate: {name}={count} exceeds learner.world_size={ranks}, so two of these would share a GPU; lower it"
        for name, count in on_gpus.items()
        if count > ranks
    ]
    if config.uses_critic and config.critic.world_size > ranks:
        problems.append(
            f"ray.colocate: critic.world_size={config.critic.world_size} exceeds learner.world_size={ranks}, so two "
            "critic ranks would share a GPU; lower it"
        )
    return problems
