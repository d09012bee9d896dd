"""How fast devices work: rates that a plan assumes, or that somebody has measured. `--rates FILE` is YAML of these."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlhf_ray.config.load import parse_config, read_yaml
from rlhf_ray.config.sections import Section


class Rates(Section):
    """Assumptions of a plan. What was measured (tokens a second) goes before what is derived."""

    train_mfu: float = Field(
        0.35, gt=0, le=1, description="share of a device's peak that a training pass reaches, what it computes anew "
        "with checkpointing included. MosaicML's LLM Foundry measured 0.30 to 0.59 on H100s (docs/plan.md)"
    )  # fmt: skip
    forward_mfu: float = Field(0.35, gt=0, le=1, description="the same of a pass without gradients, and of prompts")
    decode_bandwidth: float = Field(
        0.6, gt=0, le=1, description="share of the memory's bandwidth at which weights and keys and values are read"
    )
    launch_ms: float = Field(
        0.25, ge=0, description="time of one layer in one decoding step that no arithmetic explains, with "
        "generator.enforce_eager: kernels are started one by one"
    )  # fmt: skip
    graph_launch_ms: float = Field(0.03, ge=0, description="the same with CUDA graphs")
    reduce_ms: float = Field(0.02, ge=0, description="latency of one all-reduce between tensor-parallel devices")
    link_share: float = Field(0.7, gt=0, le=1, description="share of a link's bandwidth that collectives reach")
    network_gb_s: float = Field(
        50.0, gt=0, description="between machines, of each device, 1e9 bytes a second and direction; 50: 400 Gbit/s"
    )
    host_gb_s: float = Field(20.0, gt=0, description="between a device and its host's memory")
    host_adam: float = Field(1e9, gt=0, description="parameters a second that one rank's CPUs step (offload)")
    context_gib: float = Field(1.0, ge=0, description="of each process on a device: CUDA, NCCL, kernels")
    reserve: float = Field(0.08, ge=0, lt=1, description="share of the memory that is left free: what allocators waste")
    reward_s: float = Field(0.0, ge=0, description="seconds a step that reward functions take beyond writing")
    generate_tokens_per_s: float | None = Field(
        None, gt=0, description="measured: tokens that one generator's device writes in a second, at this batch"
    )
    train_tokens_per_s: float | None = Field(
        None, gt=0, description="measured: tokens that one learner's device learns in a second, prompts included"
    )
    price_per_device_hour: float | None = Field(None, gt=0, description="adds money to device-hours")


def read_rates(path: Path | None) -> Rates:
    """Raises ConfigError: unreadable, or a rate that is not there."""
    return Rates() if path is None else parse_config(read_yaml(path), Rates, source=str(path))
