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


def replica_problems(config: RunConfig) -> list[str]:
    """Workers of a role that stand alone, and share its work."""
    problems = [
        f"executor=local has one {name}, {name}.count={count}; set executor=ray or {name}.count=1"
        for name, count in (("reference", config.reference.count), ("reward", config.reward.count))
        if config.executor == "local" and count > 1
    ]
    if config.reference.count > 1 and not config.holds_reference:
        reason = "a LoRA policy without its adapter is its own" if config.uses_reference else "algorithm.kl_coef=0"
        problems.append(
            f"reference.count={config.reference.count}, and this run holds no reference ({reason}); remove it"
        )
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
        return shared_gpu_problems(config.ray, groups)
    problems = []
    if config.generator.count * each > ranks or ranks % each:
        problems.append(
            f"ray.colocate: {config.generator.count} generators of {each} GPUs share the GPUs of learner.world_size="
            f"{ranks} ranks, which must be at least as many and a multiple of tensor_parallel; raise "
            "learner.world_size, or lower generator.count or generator.tensor_parallel"
        )
    on_gpus = {"reference": config.reference.count, "reward": config.reward.count * config.judging.needs_gpu}
    problems += [
        f"ray.colocate: {name}.count={count} exceeds learner.world_size={ranks}, so two replicas would share a GPU; "
        "lower it"
        for name, count in on_gpus.items()
        if count > ranks
    ]
    if config.uses_critic and config.critic.world_size > ranks:
        problems.append(
            f"ray.colocate: critic.world_size={config.critic.world_size} exceeds learner.world_size={ranks}, so two "
            "critic ranks would share a GPU; lower it"
        )
    return problems
