"""Settings of `rlhf-ray generate`: how a finished model writes, and how prompts are put to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.sections import Device, Section, Seed, TopP, TrustRemoteCode


class GenerateConfig(Section):
    """What the command line says, by the names of its options."""

    max_new_tokens: int = Field(512, gt=0, description="of each answer; a model's last position ends it earlier")
    temperature: float = Field(0.7, ge=0, description="0: greedy")
    top_p: TopP = 1.0
    seed: Seed = 0
    system: str | None = Field(None, description="a system message; None: the run's data.system_prompt")
    template: Literal["auto", "chat", "alpaca", "none"] = Field(
        "auto", description="auto: the run's data.template, or the chat template where the tokenizer has one"
    )
    chat_template: str | None = Field(None, description="a .jinja file, or zephyr; empty: the tokenizer's own")
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
