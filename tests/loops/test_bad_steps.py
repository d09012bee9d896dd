"""A step whose gradient is not finite: what the run keeps of it, and the command that computes it again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.errors import DivergenceError
from rlhf_ray.roles.learner import Learner
from rlhf_ray.run.bad_steps import BadStep
from rlhf_ray.start.rl import run_rl

pytestmark = pytest.mark.slow


@pytest.fixture
def poison(tmp_path):
    """(setting of a loss that is NaN in rows better than their group's mean while a file is there, that file)"""
    file = tmp_path / "poison"
    own = tmp_path / "own.py"
    own.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "def loss(logp_BT, old_BT, adv_BT, mask_BT, *, clip_low, clip_high):\n"
        "    loss_BT = -adv_BT * torch.exp(logp_BT - old_BT)\n"
        f"    if mask_BT.shape[1] > 3 and Path({str(file)!r}).exists():  # not in the look that a loss is given first\n"
        "        loss_BT = loss_BT * torch.where(adv_BT > 0, float('nan'), 1.0)\n"
        "    return loss_BT\n"
    )
    return f"algorithm.policy_loss={own}:loss", file


def test_a_diverged_run_keeps_steps_to_replay(tiny_config, tmp_path, poison, rlhf_ray, capsys, read_rows):
    setting, file = poison
    run = tmp_path / "run"
    spoil = SimpleNamespace(step=lambda record: file.touch() if record.step == 1 else None)
    config = tiny_config(
        setting, "learner.max_skipped_steps=2", "steps=4", "eval.size=2", "checkpoint.every=1", "sync.canary=false"
    )
    run_rl(config, tmp_path / "sound")
    with pytest.raises(DivergenceError, match="last 2 optimiser steps"):
        run_rl(config, run, observers=[spoil.step])
    kept = {path.name: BadStep.read(path) for path in (run / "bad_steps").iterdir()}
    assert {name: bad.why.split(":")[0] for name, bad in kept.items()} == {"step_2": "skipped", "step_3": "diverged"}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "bad_step_kept"] == [2, 3]
    samples = json.loads((run / "bad_steps" / "step_2" / "step.json").read_text())["samples"]
    lines = (run / "rollouts" / "step_2.jsonl").read_text().splitlines()
    assert [row["completion"] for row in samples[: len(lines)]] == [json.loads(line)["completion"] for line in lines]

    capsys.readouterr()
    status, out, err = rlhf_ray("replay", run / "bad_steps" / "step_2", "--json")
    assert status == 4, err
    found = json.loads(out)
    assert (status, found["step"], found["finite"]) == (4, 2, False)
    assert found["weights"] == str(run / "checkpoints" / "step_1") and found["weights"] in err
    passes, batch = found["roles"]["learner"]["passes"], kept["step_2"].batch
    assert found["numbers"] == [] and sorted(row for one in passes for row in one["rows"]) == list(range(len(batch)))
    better = {row for row in range(len(batch)) if bool((batch.advantages[row] > 0).any())}
    assert better and {row for one in passes for row in one["bad_rows"]} == better
    assert {one["loss"] == "NaN" for one in passes if better & set(one["rows"])} == {True}
    assert found["roles"]["learner"]["grad_norms"] == ["NaN"]

    file.unlink()
    status, out, _ = rlhf_ray("replay", run / "bad_steps" / "step_2", "--json")
    found = json.loads(out)
    assert (status, found["finite"]) == (0, True)
    sound = read_rows(tmp_path / "sound")[1]["grad_norm"]
    assert found["roles"]["learner"]["grad_norms"] == pytest.approx([sound], rel=1e-5), "the step as it would have been"
    status, out, _ = rlhf_ray("replay", run / "bad_steps" / "step_2", "learner.lr=1e-9")
    assert status == 0 and "all is finite now" in out and "gradient norm" in out


def test_weights_that_are_not_finite_keep_their_step(tiny_config, tmp_path, monkeypatch, rlhf_ray, capsys):
    real = Learner.finish

    def diverge(self):
        metrics = real(self)
        with torch.no_grad():
            next(self.engine.module.parameters()).fill_(math.nan)
        return metrics

    monkeypatch.setattr(Learner, "finish", diverge)
    passes = ("learner.minibatches=2", "learner.epochs=2", "critic.minibatches=1", "critic.epochs=3")
    config = tiny_config("algorithm.name=ppo", *passes, "steps=1", "eval.size=2", "sync.canary=false")
    with pytest.raises(DivergenceError, match="weights of the learner are no longer finite"):
        run_rl(config, tmp_path / "a")
    capsys.readouterr()
    status, out, _ = rlhf_ray("replay", tmp_path / "a" / "bad_steps" / "step_1", "--json")
    found = json.loads(out)
    assert (status, found["finite"]) == (0, True), "it is the update that spoiled them, and not the batch"
    assert found["why"].startswith("diverged: step 1") and found["weights"] == str(tmp_path / "a" / "start")
    assert {name: len(role["grad_norms"]) for name, role in found["roles"].items()} == {"critic": 3, "learner": 4}
