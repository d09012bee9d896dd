"""The names a config may use."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlhf_ray.algo import advantages, policy_losses

# Scalar estimators: f(reward_B, group_B, **options) -> adv_B. `gae` and `reinforce_pp` have arguments of their own.
ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": advantages.grpo,
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "reinforce": advantages.reinforce,
    "reinforce_pp_baseline": advantages.reinforce_pp_baseline,
    "remax": advantages.remax,
    "pass_at_k": advantages.pass_at_k,
}
# f(logp_BT, old_BT, adv_BT, mask_BT, **options) -> loss_BT.
POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "clipped": policy_losses.clipped_loss,
    "gspo": policy_losses.gspo_loss,
    "cispo": policy_losses.cispo_loss,
    "policy_gradient": policy_losses.policy_gradient_loss,
}
