"""A loss, an advantage and engines from a user's file train a run; nothing of the package knows their names."""

import pytest

from rlhf_ray.start.rl import run_rl

pytestmark = pytest.mark.slow

# What is built in as `clipped` and `rloo`, as a user would write it.
OWN = """
import torch

def loss(logp_BT, old_BT, adv_BT, mask_BT, *, clip_low, clip_high, factor=1.0):
    ratio_BT = (logp_BT - old_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return factor * torch.maximum(-ratio_BT * adv_BT, -clipped_BT * adv_BT), {"adv": adv_BT}

def others(reward_B, group_B):
    same_BB = group_B[:, None] == group_B[None, :]
    total_B, count_B = (same_BB * reward_B[None, :]).sum(1), same_BB.sum(1)
    return reward_B - (total_B - reward_B) / (count_B - 1)

def generator(settings, assets, use):
    from rlhf_ray.roles.factory import make_hf_generator
    return make_hf_generator(settings, assets, use)

def trainer(model, **settings):
    from rlhf_ray.models.torch_engine import TorchEngine
    return TorchEngine(model, **settings)
"""


def test_the_same_formulas_give_the_same_run(tiny_config, tmp_path, read_rows):
    (tmp_path / "own.py").write_text(OWN)
    shape = ("steps=2", "eval.size=2", "learner.minibatches=2", "learner.lr=1e-2")
    own = (f"algorithm.policy_loss={tmp_path}/own.py:loss", f"algorithm.advantage={tmp_path}/own.py:others")
    run_rl(tiny_config(*shape, "algorithm.advantage=rloo"), tmp_path / "built_in")
    engines = (f"generator.engine={tmp_path}/own.py:generator", f"learner.engine={tmp_path}/own.py:trainer")
    run_rl(tiny_config(*shape, *own, *engines), tmp_path / "own")
    run_rl(tiny_config(*shape, *own, "algorithm.policy_loss_args={factor: 3}"), tmp_path / "other")
    built_in, mine, other = (read_rows(tmp_path / name) for name in ("built_in", "own", "other"))
    assert all(row["loss/policy"] != 0 for row in built_in)
    for expected, row in zip(built_in, mine, strict=True):
        assert row.pop("policy_loss/adv") == pytest.approx(row["advantage/mean"], abs=1e-6)
        assert expected.pop("clipfrac") >= 0 and "clipfrac" not in row, "what another's loss clips is not known"
        assert row == pytest.approx(expected, abs=1e-6)
    assert other[0]["loss/policy"] == pytest.approx(3 * mine[0]["loss/policy"], rel=0.1), "its own setting reached it"
