"""Random rollouts in float64 for the comparisons with other libraries and the property tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for enumerable.py


@dataclass(frozen=True)
class Rollout:
    logp_BT: Tensor
    old_BT: Tensor
    ref_BT: Tensor
    adv_B: Tensor
    reward_B: Tensor
    group_B: Tensor
    value_BT: Tensor
    old_value_BT: Tensor
    return_BT: Tensor
    mask_BT: Tensor  # right-padded answers of 1 to T tokens
    holes_BT: Tensor  # the same, with text from a tool in the middle

    @property
    def adv_BT(self) -> Tensor:
        return self.adv_B[:, None].expand_as(self.logp_BT).contiguous()


@pytest.fixture
def rollout() -> Rollout:
    B, T = 12, 9
    generator = torch.Generator().manual_seed(17)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    length_B = torch.randint(1, T + 1, (B,), generator=generator)
    length_B[0], length_B[1] = 1, T
    mask_BT = torch.arange(T)[None, :] < length_B[:, None]
    holes_BT = mask_BT.clone()
    holes_BT[:, 2:4] &= ~(length_B > 5)[:, None]
    logp_BT = -normal(B, T).abs() - 0.1
    return Rollout(
        logp_BT=logp_BT.requires_grad_(),
        old_BT=(logp_BT + 0.3 * normal(B, T)).detach(),
        ref_BT=(logp_BT + 0.4 * normal(B, T)).detach(),
        adv_B=normal(B),
        reward_B=normal(B),
        group_B=torch.arange(3).repeat_interleave(4),
        value_BT=normal(B, T).requires_grad_(),
        old_value_BT=normal(B, T),
        return_BT=normal(B, T),
        mask_BT=mask_BT,
        holes_BT=holes_BT,
    )
