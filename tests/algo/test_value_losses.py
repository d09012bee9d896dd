from __future__ import annotations

import pytest
import torch

from rlhf_ray.algo.policy_losses import combine_stats
from rlhf_ray.algo.value_losses import clipped_value_loss, explained_variance, value_stats


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "grad"),
    [
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # went right, but too far at once: no further push
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # inside the range
        (0.0, 1.0, 2.0, 0.5 * 2.0**2, -2.0),  # went wrong: full pull back
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, grad):
    value_BT = torch.tensor([[value]], requires_grad=True)
    loss_BT = clipped_value_loss(value_BT, torch.tensor([[old]]), torch.tensor([[target]]))
    loss_BT.sum().backward()
    assert loss_BT.item() == pytest.approx(loss) and value_BT.grad.item() == pytest.approx(grad)


def test_without_a_clip_it_is_half_the_squared_error():
    assert clipped_value_loss(torch.tensor(1.5), torch.tensor(1.0), torch.tensor(3.5), clip=None) == 2.0


def test_explained_variance_by_hand_and_in_parts():
    target_BT = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    value_BT = target_BT + torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    # Var(return) = 8/3, Var(error) = 2/3
    assert explained_variance(value_stats(value_BT, target_BT, mask_BT)) == pytest.approx(0.75)
    parts = [value_stats(value_BT[b : b + 1], target_BT[b : b + 1], mask_BT[b : b + 1]) for b in range(2)]
    assert explained_variance(combine_stats(parts)) == pytest.approx(0.75)
    assert explained_variance(value_stats(target_BT + 5, target_BT, mask_BT)) == pytest.approx(1.0)
    assert explained_variance(value_stats(torch.zeros(2, 2), target_BT, mask_BT)) == pytest.approx(0.0)


@pytest.mark.parametrize("target", [0.0, 0.1, 1e4])
def test_nothing_to_explain_gives_zero(target):
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    for some in (mask_BT, torch.zeros_like(mask_BT)):
        assert explained_variance(value_stats(torch.randn(2, 3), torch.full((2, 3), target), some)) == 0.0
