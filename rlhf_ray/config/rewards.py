"""Settings of what judges answers: reward functions, a reward model, a safety classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from rlhf_ray.config.given import FunctionName
from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.redacted import redacted
from rlhf_ray.config.sections import Section


class RewardConfig(Section):
    """A function that judges answers: docs/rewards.md."""

    function: FunctionName = Field(
        description="a built-in name, `module:function`, `file.py:function`, or the URL of a reward server"
    )
    name: str | None = Field(None, description="in the metrics; empty: the function's, or the server's host")
    weight: float = Field(1.0, description="in the sum of all rewards; negative: a penalty")
    args: dict[str, Any] = Field({}, description="keyword arguments of the function")
    adapter: Literal["auto", "trl", "verl", "openrlhf"] = Field(
        "auto", description="whose convention the function follows; auto: by the names of its parameters"
    )
    isolated: bool | None = Field(
        None, description="run it in a process of its own, which may be killed; empty: yes for functions of your own"
    )
    timeout_s: float = Field(300.0, gt=0, description="one call; needs isolated, an async function, or a server")
    on_failure: Literal["raise", "retry", "drop_group", "default"] = Field(
        "raise", description="of a row without a score: end the run; ask again, then end it; leave all answers to that "
        "prompt out; or give it default_score"
    )  # fmt: skip
    retries: int | None = Field(None, ge=0, description="repeated calls before that; empty: 2 for retry, else 0")
    default_score: float | None = Field(
        None, ge=-LARGEST_REWARD, le=LARGEST_REWARD, description="on_failure=default: the score of rows without one"
    )
    token_env: str | None = Field(None, description="reward server: environment variable with its bearer token")
    binary: bool | None = Field(
        None, description="its scores are 1 (right) or 0 (wrong), so that their mean is an accuracy; empty: yes for "
        "exact_answer, regex, math and code, no for others"
    )  # fmt: skip

    @property
    def label(self) -> str:
        """What its metric is called."""
        return self.name or default_name(self.function)

    @property
    def says_right(self) -> bool:
        """Whether its scores are declared to be 1 for right answers and 0 for wrong ones."""
        if self.binary is not None:
            return self.binary
        return self.function in _SAY_RIGHT and not self.args.get("partial")


# Built-in rewards that score 1 or 0. (`code` with args.partial gives shares.)
_SAY_RIGHT = ("exact_answer", "regex", "math", "code")


def default_name(function: str) -> str:
    """What the metric of a reward is called if the config does not say."""
    if "://" not in function:
        return function.rpartition(":")[2]
    server = re.split("[/?#]", redacted(function).partition("://")[2], maxsplit=1)[0]
    return server.rpartition("@")[2]  # a name goes into every file and logger: no user, no password


def right_by(rewards: Sequence[RewardConfig]) -> str | None:
    """The name of the reward that says which answers are right: the first that is declared to."""
    return next((reward.label for reward in rewards if reward.says_right), None)


class RewardModelConfig(Section):
    """A sequence classifier that judges prompt and answer."""

    path: str = Field(description="its Hugging Face folder or Hub name")
    weight: float = Field(1.0, description="in the sum of all rewards")
    output: Literal["logit", "logprob", "prob"] = Field("logit", description="of the positive (last) label")
    max_length: int | None = Field(
        None, gt=0, description="tokens; a longer text loses its beginning; empty: the model's own limit"
    )
    batch_size: int = Field(64, gt=0, description="texts read at once")


class SafetyConfig(Section):
    """A classifier that says how safe a text is: the reward becomes (1 - weight) * all others + weight * P(safe)."""

    path: str = Field(description="its Hugging Face folder or Hub name")
    weight: float = Field(0.5, ge=0, le=1, description="of P(safe); 0: it is measured, and counts for nothing")
    safe_label: str | None = Field(None, description="the label that means safe; empty, without unsafe_label: the last")
    unsafe_label: str | None = Field(None, description="or the one that means unsafe: P(safe) = 1 - P(unsafe)")
    max_length: int | None = Field(
        None, gt=0, description="tokens; a longer text loses its beginning; empty: the model's own limit"
    )
    batch_size: int = Field(64, gt=0, description="texts read at once")


@dataclass(frozen=True)
class RewardSettings:
    """All that judges answers in one run.

    Attributes:
        functions: their weighted sum is the reward; a reward model's output, times its own weight, is added to it.
        safety: mixed with that sum.
        clock: what the chat templates of these networks take for now.
    """

    functions: Sequence[RewardConfig] = ()
    model: RewardModelConfig | None = None
    safety: SafetyConfig | None = None
    clock: datetime | None = None

    @property
    def networks(self) -> list[str]:
        """Where the networks come from that the reward role holds."""
        return [network.path for network in (self.model, self.safety) if network is not None]

    @property
    def needs_gpu(self) -> bool:
        """Whether the reward role computes with a network of its own: a classifier, or a local AI judge."""

        def on_gpu(reward: RewardConfig) -> bool:
            if reward.function == "judge":
                return reward.args.get("endpoint") is None and reward.args.get("device", "auto") in ("auto", "cuda")
            return reward.function == "classifier" and str(reward.args.get("device")).startswith("cuda")

        return bool(self.networks) or any(map(on_gpu, self.functions))
