"""Settings of `rlhf-ray serve-reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.reward_checks import failure_problems
from rlhf_ray.config.rewards import RewardConfig, RewardModelConfig
from rlhf_ray.config.sections import Section

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RewardServerConfig(Section):
    """Reward functions, and a reward model if there is one, behind HTTP."""

    rewards: list[RewardConfig] = []
    reward_model: RewardModelConfig | None = None
    host: str = Field("127.0.0.1", description="0.0.0.0: every address of this machine; needs token_env")
    port: int = Field(8000, ge=0, le=65535, description="0: a free one, which is printed")
    token_env: str | None = Field(None, description="environment variable with the bearer token that clients must send")
    max_body_mb: float = Field(64.0, gt=0, description="larger requests are refused")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="of the reward model")

    def contradictions(self) -> list[str]:
        problems = [p for i, reward in enumerate(self.rewards) for p in failure_problems(reward, f"rewards.{i}")]
        if not self.rewards and self.reward_model is None:
            problems.append("no reward to serve; set rewards or reward_model.path")
        if self.token_env is None and self.host not in LOOPBACK:
            problems.append(
                f"host={self.host} lets other machines in, and without token_env everybody there could use the "
                "server; set token_env, or host=127.0.0.1"
            )
        return problems
