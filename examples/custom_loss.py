"""A policy loss and an advantage of one's own, named by this file: nothing of the package is changed.

    python examples/custom_loss.py

What such functions are given and must return: docs/algorithms.md, "Your own loss or advantage".
"""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_ray


def soft_clip(
    logp_BT: Tensor, old_BT: Tensor, adv_BT: Tensor, mask_BT: Tensor, *, clip_high: float, slope: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Beyond the clip range the gradient becomes weak (`slope`) and not nothing. A loss for each token [B, T]; what is
    over the range is logged as policy_loss/over."""
    ratio_BT = (logp_BT - old_BT).exp()
    over_BT = (ratio_BT - 1 - clip_high).clamp(min=0)
    return -(ratio_BT - (1 - slope) * over_BT) * adv_BT, {"over": over_BT}


def over_the_median(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """How much better an answer is than the median of those to the same prompt. [B]"""
    median_B = torch.stack([reward_B[group_B == group].median() for group in group_B])
    return reward_B - median_B


def shorter(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def main(steps: int = 30, run_dir: str | None = None) -> None:
    result = rlhf_ray.rl(
        model={"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"}, "scratch": {"max_length": 16}},
        prompts=[{"prompt": f"{number}?"} for number in range(64)], rewards=shorter, steps=steps, run_dir=run_dir,
        algorithm={
            "policy_loss": f"{__file__}:soft_clip", "policy_loss_args": {"slope": 0.1},
            "advantage": f"{__file__}:over_the_median",
        },
        data={"max_prompt_tokens": 8}, rollout={"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 6},
        learner={"lr": 1e-3, "minibatches": 2},
    )  # fmt: skip
    print(result, f"over the range: {result.metrics[-1]['policy_loss/over']:.5f}")


if __name__ == "__main__":
    main()
