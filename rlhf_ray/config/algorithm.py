"""Settings of the algorithm: how rewards become advantages, and these a loss; what each algorithm's name fills in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rlhf_ray.config.formula_names import ADVANTAGES, OWN_ADVANTAGE, OWN_LOSS, POLICY_LOSSES, Advantage, PolicyLoss
from rlhf_ray.config.given import FunctionName
from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.names import known_or_own
from rlhf_ray.config.sections import Section

# What each algorithm means; every field may still be set by hand.
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo"},
    "ppo": {"advantage": "gae", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.05, "whiten_advantages": True},
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "seq_sum_const"},
    "dapo": {
        "advantage": "grpo",
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "resample_rounds": 3,
        "overlong_buffer": 0.2,
    },
    "gspo": {
        "advantage": "grpo",
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq_mean",
    },
    "cispo": {"advantage": "grpo", "policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "rloo", "aggregation": "seq_mean"},
    "reinforce": {"advantage": "reinforce", "policy_loss": "policy_gradient"},
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.01},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"},
    "remax": {"advantage": "remax", "policy_loss": "policy_gradient", "aggregation": "seq_sum_const"},
}


# How often the learner and the critic go over each step's rollouts, and in how many minibatches. PPO's paper does so 3
# to 15 times (Schulman et al. 2017, tables 3 to 5), TRL's PPO 4 times. The other algorithms take one step.
PASSES = {"ppo": 4}


def passes_of(name: str, prompts_per_step: int) -> dict[str, int]:
    """`epochs` and `minibatches` of the learner and the critic that an algorithm means, where the config says nothing.

    Minibatches are to be of one size, so of 6 prompts there are 2 and not 4.
    """
    passes = PASSES.get(name, 1)
    return {"epochs": passes, "minibatches": math.gcd(passes, prompts_per_step)}


class AlgorithmConfig(Section):
    """What is learned from the rewards: docs/algorithms.md.

    `name` fills in the other settings; each may still be set by hand.
    """

    name: Literal[
        "grpo", "ppo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline",
        "remax",
    ] = Field("grpo", description="fills in what the table below says")  # fmt: skip
    advantage: FunctionName = Field(
        "grpo", description=f"with what an answer is compared: {', '.join(ADVANTAGES)} (with what a critic expects of "
        "it), or your own, `module:function` or `file.py:function` (algorithms.md)"
    )  # fmt: skip
    advantage_args: dict[str, Any] = Field({}, description="settings of an advantage of your own")
    normalize_std: bool = Field(True, description="grpo: divide by the standard deviation of the group")
    k: int = Field(4, gt=0, description="pass_at_k: answers of which the best counts")
    moving_baseline: bool = Field(False, description="reinforce: subtract the mean of past rewards, not the batch's")
    whiten_advantages: bool = Field(False, description="to mean 0 and variance 1 over all tokens of the step")
    gamma: float = Field(1.0, ge=0, le=1, description="gae, reinforce_pp: discount of a reward, a token; 1: none")
    lam: float = Field(0.95, ge=0, le=1, description="gae: 1 looks at rewards to the end, 0 at the critic's next value")
    policy_loss: FunctionName = Field(
        "clipped", description="clipped: PPO's, by tokens; gspo: the same by whole answers; cispo: clips the weight, "
        "not the token; policy_gradient: without a ratio of new to old probability; or your own, `module:function` or "
        "`file.py:function` (algorithms.md)"
    )  # fmt: skip
    policy_loss_args: dict[str, Any] = Field({}, description="settings of a loss of your own")
    clip_low: float = Field(0.2, ge=0, le=1, description="the ratio of new to old is clipped at 1 - clip_low")
    clip_high: float = Field(0.2, ge=0, description="and at 1 + clip_high")
    dual_clip: float | None = Field(
        None, gt=1, description="clipped: a token of advantage A < 0 has a loss of at most -dual_clip * A; empty: off"
    )
    aggregation: Literal["token_mean", "seq_mean", "seq_sum_const"] = Field(
        "token_mean", description="the loss is a mean over all tokens; over answers, of each answer's mean; or over "
        "answers, of each answer's sum divided by max_new_tokens"
    )  # fmt: skip
    entropy_coef: float = Field(0.0, ge=0, description="takes so much of the entropy (nats a token) off the loss")
    entropy_coef_end: float | None = Field(None, ge=0, description="entropy_coef moves here over the run")
    sft_coef: float = Field(
        0.0, ge=0, description="PPO-ptx: adds so much of the loss of sft (nats a token) on rows of sft_data"
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="where the KL to the reference counts: as a term of the loss, or taken off the reward"
    )
    kl_coef: float = Field(0.0, ge=0, description="0: the reference model is not even loaded")
    kl_coef_end: float | None = Field(None, ge=0, description="kl_controller=fixed: kl_coef moves here over the run")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k3", description="of a token, with d = log pi - log pi_ref: k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d; abs: d "
        "without its sign"
    )  # fmt: skip
    kl_controller: Literal["fixed", "adaptive", "scheduled"] = Field(
        "fixed", description="adaptive: kl_coef follows the KL that is seen, towards kl_target; scheduled: that target "
        "moves to kl_target_end"
    )  # fmt: skip
    kl_target: float = Field(6.0, gt=0, description="adaptive: wanted KL of a whole completion, in nats")
    kl_target_end: float | None = Field(None, gt=0, description="scheduled: kl_target moves here over the run")
    kl_horizon: int = Field(10_000, gt=0, description="adaptive: samples in which it moves by 20 % or less")
    resample_rounds: int = Field(
        0, ge=0, description="dynamic sampling: how often to replace prompts whose answers all earn the same"
    )
    overlong_buffer: float = Field(
        0.0, ge=0, le=1, description="last share of max_new_tokens in which a length penalty grows to -1; 0: none"
    )
    reward_clip: float | None = Field(
        None, gt=0, le=LARGEST_REWARD, description="clips rewards to plus or minus this, once normalized; empty: off"
    )
    normalize_rewards: Literal["none", "running", "source", "group"] = Field(
        "none",
        description="divide rewards by the standard deviation of all so far, or of all so far from the same source; "
        "or centre and divide them within each group",
    )
    source_field: str = Field("data_source", description="normalize_rewards=source: column that names the source")
    correction: Literal["none", "truncate", "mask"] = Field(
        "none", description="importance weights for differences between generator and learner"
    )
    correction_level: Literal["token", "sequence", "geometric"] = Field(
        "token", description="a weight for each token; for each answer, their product; or their geometric mean"
    )
    correction_cap: float = Field(
        2.0, ge=1, description="truncate: larger weights become this; mask: tokens with a larger weight, or one below "
        "1 / correction_cap, are left out"
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {**PRESETS.get(str(given.get("name", "grpo")), {}), **given}
        return given

    @field_validator("advantage", "policy_loss")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        return known_or_own(name, ADVANTAGES if info.field_name == "advantage" else POLICY_LOSSES)

    @property
    def advantage_facts(self) -> Advantage:
        return ADVANTAGES.get(self.advantage, OWN_ADVANTAGE)

    @property
    def loss_facts(self) -> PolicyLoss:
        return POLICY_LOSSES.get(self.policy_loss, OWN_LOSS)

    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Those of these settings that `function` takes by keyword only."""
        known, parameters = self.model_dump(), inspect.signature(function).parameters.values()
        return {p.name: known[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in known}
