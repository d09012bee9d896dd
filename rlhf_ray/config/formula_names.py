"""The names of losses and advantages that a config may use, and what the rest of the house must know of each.

A name stands here with the place of its function and with facts about it; whoever checks a config asks for the facts,
not for names. Nothing heavy is imported before a function is called. What a user names by `module:function` has the
facts that a field has by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Formula:
    """A function of algo/, by its place: `file:function`."""

    place: str

    @cached_property
    def function(self) -> Callable[..., Any]:
        return _function_at(self.place)

    def __call__(self, *tensors: Tensor, **settings: Any) -> Any:
        return self.function(*tensors, **settings)


@dataclass(frozen=True)
class PolicyLoss(Formula):
    """f(logp_BT, old_BT, adv_BT, mask_BT, **settings) -> loss_BT.

    Attributes:
        clips: place of a function (ratio_BT, adv_BT, **settings) -> which tokens the loss clips; None: it is not known.
        of_answers: the ratio that it clips is the whole answer's.
        has_ratio: it corrects for the steps since `old_BT`, so that later optimiser steps on a batch are right, too.
        has_dual_clip: it takes `dual_clip`.
    """

    clips: str | None = None
    of_answers: bool = False
    has_ratio: bool = True
    has_dual_clip: bool = False

    @cached_property
    def clips_function(self) -> Callable[..., Tensor] | None:
        return None if self.clips is None else _function_at(self.clips)


@dataclass(frozen=True)
class Advantage(Formula):
    """f(reward_B, group_B, **settings) -> adv_B; with `of_tokens` its arguments are its own, and it returns adv_BT.

    Attributes:
        baseline: with what an answer is compared: the others of its group, the step's answers, the greedy answer to the
            same prompt, what a critic expects; "own": nobody but its author knows.
        of_tokens: it differs from token to token.
        may_move: the baseline may be a moving average over past steps.
    """

    baseline: Literal["group", "step", "greedy", "critic", "own"] = "group"
    of_tokens: bool = False
    may_move: bool = False


def _function_at(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(f"rlhf_ray.algo.{module}"), name)


ADVANTAGES = {
    "grpo": Advantage("advantages:grpo"),
    "dr_grpo": Advantage("advantages:dr_grpo"),
    "rloo": Advantage("advantages:rloo"),
    "reinforce": Advantage("advantages:reinforce", baseline="step", may_move=True),
    "reinforce_pp": Advantage("advantages:reinforce_pp", baseline="step", of_tokens=True),
    "reinforce_pp_baseline": Advantage("advantages:reinforce_pp_baseline"),
    "remax": Advantage("advantages:remax", baseline="greedy"),
    "pass_at_k": Advantage("advantages:pass_at_k"),
    "gae": Advantage("advantages:gae", baseline="critic", of_tokens=True),
}
POLICY_LOSSES = {
    "clipped": PolicyLoss("policy_losses:clipped_loss", clips="policy_losses:past_clip", has_dual_clip=True),
    "gspo": PolicyLoss("policy_losses:gspo_loss", clips="policy_losses:past_clip", of_answers=True),
    "cispo": PolicyLoss("policy_losses:cispo_loss", clips="policy_losses:outside_clip"),
    "policy_gradient": PolicyLoss(
        "policy_losses:policy_gradient_loss", clips="policy_losses:nowhere", has_ratio=False
    ),
}  # fmt: skip
# What is known of a function that a user has written.
OWN_ADVANTAGE, OWN_LOSS = Advantage("", baseline="own"), PolicyLoss("")
