"""Sampling strategies, and algorithms that change what is generated, on real roles: a few thousand weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.algo.kl import ScheduledKL
from rlhf_ray.loops.rl import new_controller
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start.rl import run_rl

# Two letters are enough to be right or wrong about: the reward says whether the answer begins with an even digit.
PARITY = "rewards.0={function: regex, args: {pattern: '[02468].*'}}"


@pytest.fixture
def estimated(monkeypatch):
    """The batches that reach the estimator, in order."""
    batches = []
    real = AdvantageEstimator.estimate
    monkeypatch.setattr(
        AdvantageEstimator, "estimate", lambda self, batch, coef: (batches.append(batch), real(self, batch, coef))[1]
    )
    return batches


def test_remax(tiny_config, tmp_path, read_rows, estimated):
    config = tiny_config("algorithm.name=remax", "rollout.group_size=2", "steps=2", "eval.size=2")
    run_rl(config, tmp_path / "a")
    for batch in estimated:
        assert len(batch) == 8 and batch.baseline.shape == (8,), "four prompts, two sampled answers each"
        assert batch.baseline.view(4, 2).diff().abs().max() == 0, "one greedy answer a prompt"
    for row in read_rows(tmp_path / "a"):
        assert row["mismatch/absdiff_max"] < 1e-5 and row["ratio/max"] == 1 and row["grad_norm"] > 0


@pytest.mark.slow
def test_members_of_different_temperatures(tiny_config, tmp_path, read_rows, estimated):
    """Generator and learner agree row by row, and the first ratio is exactly 1, with a pass for the old ones too."""
    settings = ("rollout.temperatures=[0.3,1.0,3.0]", "steps=2", "eval.size=2", "algorithm.kl_coef=0.01")
    for name, more in (("one", ()), ("several", ("learner.minibatches=2", "learner.lr=1e-45"))):
        run_rl(tiny_config(*settings, *more), tmp_path / name)
        for row in read_rows(tmp_path / name):
            assert row["mismatch/absdiff_max"] < 1e-5 and row["ratio/max"] == 1 and row["approx_kl"] == 0
        assert abs(read_rows(tmp_path / name)[0]["kl_ref"]) < 1e-5, "the reference reads them at the same temperatures"
    batch = estimated[0]
    assert batch.temperature.tolist() == pytest.approx([0.3, 1.0, 3.0, 0.3] * 4)
    certain = batch.logp_gen.sum(1)
    assert certain[batch.temperature < 0.5].mean() > certain[batch.temperature > 2].mean()


@pytest.mark.slow
def test_a_temperature_that_moves_over_the_run(tiny_config, tmp_path, read_rows, estimated):
    """Generator, learner and reference follow it, and so does a run that stopped in between."""
    settings = ("rollout.temperature=2.0", "rollout.temperature_end=0.5", "eval.size=2", "algorithm.kl_coef=0.01")
    run_rl(tiny_config(*settings, "steps=4"), tmp_path / "a")
    assert [set(batch.temperature.tolist()) for batch in estimated] == [{2.0}, {1.5}, {1.0}, {0.5}]
    for row in read_rows(tmp_path / "a"):
        assert row["mismatch/absdiff_max"] < 1e-5 and row["ratio/max"] == 1
    run_rl(tiny_config(*settings, "steps=4", "checkpoint.every=2"), tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_4")
    run_rl(tiny_config(*settings, "steps=4"), tmp_path / "b", resume=True)
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_a_kl_coefficient_that_moves_over_the_run(tiny_config, tmp_path, read_rows):
    """From the first step to the last, also while only the critic learns, and in a run that stopped in between."""
    line = ("algorithm.kl_coef=0.0", "algorithm.kl_coef_end=0.4", "eval.size=2", "steps=5")
    run_rl(tiny_config(*line), tmp_path / "a")
    assert [row["kl_coef"] for row in read_rows(tmp_path / "a")] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    ppo = (*line, "algorithm.name=ppo", "critic.warmup_steps=2", "checkpoint.every=3")
    run_rl(tiny_config(*ppo), tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_5")
    run_rl(tiny_config(*ppo), tmp_path / "b", resume=True)
    assert [row["kl_coef"] for row in read_rows(tmp_path / "b")] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow
def test_reference_answers_in_the_group(tiny_config, tmp_path, read_rows, estimated):
    settings = ("rollout.reference_answers=1", "rewards=[{function: exact_answer}]", "steps=2", "eval.size=2")
    run_rl(tiny_config(*settings, "algorithm.correction=truncate"), tmp_path / "a")
    batch = estimated[0]
    given_B = (batch.weight_version < 0).all(1)
    assert given_B.tolist() == [False, False, False, True] * 4
    assert batch.score[given_B].tolist() == [1.0] * 4, "the data's own answers are right"
    for row in read_rows(tmp_path / "a"):
        assert row["mismatch/absdiff_max"] < 1e-5 and row["ratio/max"] == 1 and row["staleness/max"] == 0
        assert row["reward/mean"] >= 0.25


@pytest.mark.slow
def test_dapo_learns_from_mixed_groups_only(tiny_config, tmp_path, read_rows, estimated):
    config = tiny_config("algorithm.name=dapo", "algorithm.resample_rounds=6", PARITY, "steps=2", "eval.size=2")
    run_rl(config, tmp_path / "a")
    rows = read_rows(tmp_path / "a")
    assert any(row["groups/asked"] > 4 for row in rows), "the comparison below is worth something"
    for row, batch in zip(rows, estimated, strict=True):
        assert len(batch) == 16 and row["reward/overlong_penalty"] < 0
        # The penalty is -1 or 0 on at most four tokens: what is left without it is right (1) or wrong (0).
        right_G4 = (batch.score + (batch.response_mask.sum(1) == 4).float()).view(4, 4)
        mixed = [0 < float(group.sum()) < 4 for group in right_G4]
        assert sum(mixed) / 4 == row["groups/informative"] > row["groups/mixed"] - 1e-9


@pytest.mark.slow
def test_dynamic_sampling_resumes_bit_for_bit(tiny_config, tmp_path, read_rows, monkeypatch):
    """The place in the prompt stream is no function of the step any more: the checkpoint holds it."""
    config = tiny_config(
        "algorithm.name=dapo", PARITY, "steps=4", "checkpoint.every=1", "eval.size=2", "logging.rollouts=64"
    )
    run_rl(config, tmp_path / "whole")
    log = TrainingRun.log

    def interrupted(self, number, *args):
        if number == 3:
            monkeypatch.setattr(TrainingRun, "log", log)
            raise KeyboardInterrupt
        return log(self, number, *args)

    monkeypatch.setattr(TrainingRun, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_rl(config, tmp_path / "parts")
    run_rl(config, tmp_path / "parts", resume=True)
    assert read_rows(tmp_path / "parts") == read_rows(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    learned = []
    for step in range(1, 5):
        lines = (tmp_path / "parts" / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        learned.append({json.loads(line)["prompt_id"] for line in lines})
    assert all(max(a) < min(b) for a, b in zip(learned, learned[1:], strict=False)), "each prompt in one step only"
    asked = sum(row["groups/asked"] for row in read_rows(tmp_path / "parts"))
    assert asked > 16 and max(learned[-1]) < asked, "the stream was read on, without a gap"


@pytest.mark.slow
def test_a_scheduled_target_goes_on_where_it_was(tiny_config, tmp_path):
    settings = (
        "algorithm.kl_coef=0.1", "algorithm.kl_controller=scheduled", "algorithm.kl_target=8",
        "algorithm.kl_target_end=1", "algorithm.kl_horizon=160", "eval.size=2",
    )  # fmt: skip
    algorithm = tiny_config(*settings).algorithm
    assert new_controller(algorithm, 48) == ScheduledKL(0.1, 8.0, 1.0, span=48, horizon=160)
    for steps in (2, 3):
        run_rl(tiny_config(*settings, f"steps={steps}"), tmp_path / "a", resume=True)
        state = torch.load(tmp_path / "a" / "checkpoints" / f"step_{steps}" / "state.pt")["kl"]
        assert state["elapsed"] == 16 * steps
        # The KL is far below every target: the error is clipped at -0.2, and n/horizon = 1/10.
        assert state["coef"] == pytest.approx(0.1 * 0.98**steps)


@pytest.mark.slow
def test_a_target_moves_on_while_only_the_critic_learns(tiny_config, tmp_path):
    run_rl(
        tiny_config(
            "algorithm.name=ppo", "algorithm.kl_controller=scheduled", "algorithm.kl_target=8", "critic.warmup_steps=2",
            "algorithm.kl_target_end=1", "algorithm.kl_horizon=160", "eval.size=2", "steps=3",
        ),
        tmp_path / "a",
    )  # fmt: skip
    state = torch.load(tmp_path / "a" / "checkpoints" / "step_3" / "state.pt")["kl"]
    assert state["elapsed"] == 48 and state["coef"] == pytest.approx(0.05 * 0.98), "one step measured a KL"
