from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.best import BestPolicy, measure_of
from rlhf_ray.models.train_state import MASTER, TrainState
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.start.rl import run_rl


class Exporting:
    """A learner whose model is the number of its step."""

    def __init__(self):
        self.step, self.exports = 0, 0

    def export_model(self, folder):
        (folder / "model").write_text(str(self.step))
        self.exports += 1


@pytest.fixture
def learner():
    return Exporting()


def consider(best: BestPolicy, learner: Exporting, values: dict[int, float]) -> None:
    for step, value in values.items():
        learner.step = step
        best.consider(step, {"reward": value, "samples": []})


def test_the_highest_number_stays(learner, tmp_path):
    best = BestPolicy("reward", learner, RunDirectory(tmp_path / "run"))
    consider(best, learner, {0: 0.1, 10: 0.7, 20: float("nan"), 30: 0.7, 40: 0.6})
    kept = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best.found == {"step": 10, "reward": 0.7} == {name: kept[name] for name in ("step", "reward")}
    assert (tmp_path / "run" / "best_model" / "model").read_text() == "10" and learner.exports == 2


def test_a_resumed_run_repeats_what_came_after_its_checkpoint(learner, tmp_path):
    consider(BestPolicy("reward", learner, RunDirectory(tmp_path / "run")), learner, {0: 0.1, 10: 0.2, 20: 0.7})
    (tmp_path / "run" / "config.yaml").write_text("")
    best = BestPolicy("reward", learner, RunDirectory(tmp_path / "run", resume=True))
    consider(best, learner, {10: 0.2, 20: 0.65})  # the same step came out otherwise
    assert best.found == {"step": 20, "reward": 0.65}, "what lies there is what the file says"
    consider(best, learner, {30: 0.6})
    assert best.found["step"] == 20 and (tmp_path / "run" / "best_model" / "model").read_text() == "20"


def test_a_number_that_is_not_there_is_refused_at_the_first_evaluation(learner, tmp_path):
    best = BestPolicy("acuracy", learner, RunDirectory(tmp_path / "run"))
    with pytest.raises(ConfigError, match="eval.best_by=acuracy: the evaluation has no such number; it has reward"):
        best.consider(0, {"reward": 1.0, "samples": []})


def test_numbers_of_another_measure_are_not_compared(learner, tmp_path, tiny_config):
    """A reward of twice the weight would make every later policy the best one, and half of it none."""
    def measure(*settings: str) -> str:
        config = tiny_config(*settings)
        return measure_of(config.eval, config.judging, config.rollout.max_new_tokens)

    one, other = (measure(f"rewards.0.weight={weight}") for weight in (1, 0.5))
    assert one == measure("rewards.0.weight=1", "steps=9", "eval.every=3", "learner.lr=1") != other
    directory = RunDirectory(tmp_path / "run")
    consider(BestPolicy("reward", learner, directory, measure=one), learner, {0: 0.1, 10: 0.7})
    (tmp_path / "run" / "config.yaml").write_text("")
    directory = RunDirectory(tmp_path / "run", resume=True)
    assert BestPolicy("reward", learner, directory, measure=one).found == {"step": 10, "reward": 0.7}
    with pytest.warns(UserWarning, match="step 10: what eval measures has changed, so reward 0.7 of step 10 is not"):
        best = BestPolicy("reward", learner, directory, measure=other)
    consider(best, learner, {20: 0.4})
    assert best.found == {"step": 20, "reward": 0.4}
    assert [event["step"] for event in directory.read_events() if event["event"] == "best_forgotten"] == [10]
    assert BestPolicy("accuracy", learner, directory, measure=other).found == {}, "another number, another best"


def test_a_number_that_is_missing_later_ends_no_run(learner, tmp_path):
    """A graded reward may be 0 everywhere before the first step: then there is an accuracy, and afterwards none."""
    directory = RunDirectory(tmp_path / "run")
    best = BestPolicy("accuracy", learner, directory)
    best.consider(0, {"reward": 0.0, "accuracy": 0.0})
    with pytest.warns(UserWarning, match="step 5: eval.best_by=accuracy: .* it has reward. .* step 0 stays the best"):
        best.consider(5, {"reward": 0.5})
    best.consider(10, {"reward": 1.0, "accuracy": 1.0})
    assert best.found == {"step": 10, "accuracy": 1.0}
    assert [event["step"] for event in directory.read_events() if event["event"] == "not_compared"] == [5]


@pytest.mark.slow
def test_a_run_keeps_the_weights_of_its_best_evaluation(tiny_config, tmp_path, read_rows):
    """A rate that wrecks the policy: the best evaluation is not the last one."""
    settings = ("steps=4", "eval.every=1", "eval.size=16", "eval.best_by=reward", "checkpoint.every=1",
                "checkpoint.keep=9", "learner.lr=0.3")  # fmt: skip
    summary = run_rl(tiny_config(*settings), tmp_path / "a")
    values = [summary["before"]["reward"], *(row["eval/reward"] for row in read_rows(tmp_path / "a")[:-1]),
              summary["after"]["reward"]]  # fmt: skip
    step = values.index(max(values))
    assert summary["best"] == {"step": step, "reward": max(values)} and len(set(values)) > 2
    kept = load_file(tmp_path / "a" / "best_model" / "model.safetensors")
    last = load_file(tmp_path / "a" / "model" / "model.safetensors")
    if step:
        saved = TrainState(tmp_path / "a" / "checkpoints" / f"step_{step}" / "learner")
        assert all(torch.equal(kept[name].flatten(), saved.values(MASTER, name)) for name in kept)
    assert step < 4 and any(not torch.equal(kept[name], last[name]) for name in kept)


@pytest.mark.slow
def test_a_run_that_is_resumed_behind_its_end_says_which_step_it_judged(tiny_config, tmp_path):
    settings = ("eval.size=4", "eval.best_by=response_len", "checkpoint.every=1")
    run_rl(tiny_config(*settings, "steps=3"), tmp_path / "a")
    (tmp_path / "a" / "best.json").unlink()
    summary = run_rl(tiny_config(*settings, "steps=2"), tmp_path / "a", resume=True)
    assert summary["steps"] == 3 == summary["best"]["step"]
