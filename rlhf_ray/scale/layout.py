"""Who has which devices: a layout of an RL run, as its config says it, and as a plan may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.schema import RunConfig

ALONE, SHARED = 0.8, 0.4  # vLLM's share of a device where the config says none (roles/factory.py)


@dataclass(frozen=True)
class Layout:
    """Attributes:
    colocated: everybody shares the learner's devices and takes turns (`ray.colocate`).
    generators, tensor_parallel: how many, and devices of each.
    ranks, critic_ranks: devices of the learner and the critic; 0 where there is no critic.
    reference, reward: replicas; 0 where there is none, or it needs no device.
    reference_ranks, reward_ranks: devices of each, which hold a part of the weights each.
    zero_stage, offload, checkpointing, microbatch: of learner and critic.
    utilization: vLLM's share of a device's memory.
    """

    colocated: bool
    generators: int
    tensor_parallel: int
    ranks: int
    critic_ranks: int = 0
    reference: int = 0
    reward: int = 0
    zero_stage: int = 2
    offload: str = "none"
    checkpointing: bool = False
    microbatch: int = 16_384
    utilization: float = ALONE
    reference_ranks: int = 1
    reward_ranks: int = 1

    @property
    def devices(self) -> int:
        """That the run reserves (remote/placement.py places them)."""
        if self.colocated:
            return self.ranks
        alone = self.critic_ranks + self.devices_of("reference") + self.devices_of("reward")
        return self.generators * self.tensor_parallel + self.ranks + alone

    def devices_of(self, frozen: str) -> int:
        """Of all replicas of `reference` or `reward`."""
        return int(getattr(self, frozen) * getattr(self, f"{frozen}_ranks"))

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """What the config itself says."""
        learner, generator = config.learner, config.generator
        colocated = config.ray.colocate
        return cls(
            colocated, generator.count, generator.tensor_parallel, learner.world_size,
            config.critic.world_size if config.uses_critic else 0,
            config.reference.count if config.holds_reference else 0,
            config.reward.count if config.judging.needs_gpu else 0,
            learner.zero_stage if learner.facts.shards else 0, learner.offload,
            learner.gradient_checkpointing, learner.tokens_per_microbatch,
            generator.gpu_memory_utilization or (SHARED if colocated else ALONE),
            config.reference.world_size, config.reward.world_size,
        )  # fmt: skip

    @property
    def trained(self) -> tuple[str, ...]:
        return ("learner", "critic") if self.critic_ranks else ("learner",)

    @property
    def frozen(self) -> dict[str, int]:
        """Replicas of the roles that do not learn, of those that have devices."""
        return {name: getattr(self, name) for name in ("reference", "reward") if getattr(self, name)}

    def section(self, name: str) -> dict[str, Any]:
        """What this layout sets in the section `name`: learner or critic."""
        ranks = self.ranks if name == "learner" else self.critic_ranks
        return {
            "engine": "torch" if ranks == 1 and self.offload == "none" else "deepspeed",
            "world_size": ranks,
            "zero_stage": self.zero_stage,
            "offload": self.offload,
            "gradient_checkpointing": self.checkpointing,
            "tokens_per_microbatch": self.microbatch,
        }

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """Setting by dotted name -> value: what this layout changes in the config."""
        wanted: dict[str, Any] = {
            "executor": "ray",
            "ray.colocate": self.colocated,
            "generator.engine": "vllm",
            "generator.count": self.generators,
            "generator.tensor_parallel": self.tensor_parallel,
            "generator.gpu_memory_utilization": self.utilization,
        }
        for name in self.trained:
            section = self.section(name)
            if section["engine"] == "torch":
                del section["zero_stage"]  # says nothing there
            wanted |= {f"{name}.{key}": value for key, value in section.items()}
        wanted |= {f"{name}.count": count for name, count in self.frozen.items()}
        wanted |= {f"{name}.world_size": getattr(self, f"{name}_ranks") for name in self.frozen}
        if self.utilization == (SHARED if self.colocated else ALONE):
            del wanted["generator.gpu_memory_utilization"]
        return {name: value for name, value in wanted.items() if _setting(config, name) != value}


def _setting(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = getattr(config, key)
    return config
