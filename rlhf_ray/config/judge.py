"""Settings of an AI judge: which model, where it runs, what it is asked."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.config.sections import RunDate, Section, Seed, TrustRemoteCode


class JudgeConfig(Section):
    """A language model that says which of two answers is better, or how good one is: docs/ai_feedback.md."""

    model: str = Field(description="its name at `endpoint`; without one, a Hugging Face folder or Hub name")
    endpoint: str | None = Field(None, description="base URL of an OpenAI-compatible server: http://host:8000/v1")
    api_key_env: str | None = Field(None, description="the environment variable that holds the key; empty: no key")
    rubric: str = Field("helpful", description="helpful, harmless, honest, quality, or the criterion in your own words")
    scale: tuple[int, int] = Field((1, 10), description="lowest and highest score")
    temperature: float = Field(0.0, ge=0, description="endpoint: 0 gives the same verdict each time")
    max_tokens: int = Field(512, gt=0, description="endpoint: tokens of a reply, reasons included")
    seed: Seed = Field(0, description="endpoint: sent with each request")
    concurrency: int = Field(16, gt=0, description="endpoint: requests under way at the same time")
    timeout_s: float = Field(120.0, gt=0, description="endpoint: of one request")
    retries: int = Field(4, ge=0, description="endpoint: after a refused, slow or broken request, with back-off")
    attempts: int = Field(3, gt=0, description="endpoint: how often it is asked until its reply can be read")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="local judge")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="local judge")
    clock: RunDate = None
    trust_remote_code: TrustRemoteCode = False

    @model_validator(mode="after")
    def _scale_rises(self) -> JudgeConfig:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)} does not rise; give [lowest, highest], e.g. [1, 10]")
        return self


def judge_problems(reward: RewardConfig, key: str) -> list[str]:
    """What is wrong with the args of a reward that is an AI judge: they are a JudgeConfig, and as strict."""
    if reward.function != "judge":
        return []
    try:
        JudgeConfig(**reward.args)
    except ValidationError as error:
        return [_describe(f"{key}.args", item) for item in error.errors()]
    return []


def _describe(section: str, item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, JudgeConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(JudgeConfig.model_fields)}"
        return f"{section}.{name}: unknown key of a judge; {hint}"
    return f"{section}{'.' if name else ''}{name}: {item['msg'][0].lower()}{item['msg'][1:]}"
