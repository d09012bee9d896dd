"""The algorithm functions solve a control task: what a sign error in an advantage or a ratio would not survive."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def cartpole(repo_root):
    pytest.importorskip("gymnasium")
    spec = importlib.util.spec_from_file_location("cartpole", repo_root / "examples" / "cartpole.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cartpole"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_episodes_are_rows_with_a_mask(cartpole):
    torch.manual_seed(0)
    policy = cartpole.network(2)
    batch = cartpole.play(policy, 4, seed=7)
    same = cartpole.play(policy, 4, seed=7)
    assert torch.equal(batch.state_BTS, same.state_BTS) and torch.equal(batch.action_BT, same.action_BT)
    assert torch.equal(batch.return_B, batch.mask_BT.sum(1).float())
    for b, length in enumerate(batch.mask_BT.sum(1).tolist()):
        assert batch.mask_BT[b, :length].all(), "an episode has no holes"
        assert abs(batch.last_BS[b, 2]) > 0.2 or abs(batch.last_BS[b, 0]) > 2.4, "an untrained policy falls"
    assert not batch.cut_B.any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_cartpole_is_solved(cartpole, algorithm, seed):
    result = cartpole.train(algorithm, seed)
    assert result.mean_return >= 475.0, result
    assert result.iterations < 300, "solved, not stopped"
