"""The names a config may use."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from rlhf_ray.algo import advantages, policy_losses

# Scalar estimators: f(reward_B, group_B, **options) -> adv_B.
ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": advantages.grpo,
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "leave_one_out": advantages.rloo,
    "reinforce": advantages.reinforce,
    "reinforce_pp_baseline": advantages.reinforce_pp_baseline,
    "remax": advantages.remax,
    "pass_at_k": advantages.pass_at_k,
}
# Token estimators have their own arguments: they need values, or rewards at tokens.
TOKEN_ADVANTAGES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": advantages.gae,
    "reinforce_pp": advantages.reinforce_pp,
}
# f(logp_BT, old_BT, adv_BT, mask_BT, **options) -> loss_BT.
POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "clipped": policy_losses.clipped_loss,
    "gspo": policy_losses.gspo_loss,
    "cispo": policy_losses.cispo_loss,
    "policy_gradient": policy_losses.policy_gradient_loss,
}
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def options_of(function: Callable[..., object]) -> frozenset[str]:
    """Names of the keyword-only options a registered function takes, so that a config can reject the
    others.
    """
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
