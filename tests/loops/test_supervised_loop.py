"""The supervised loop with a trainer that only remembers what it was asked: order, validation, checkpoints, resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.supervised import SFTConfig, ValidationConfig
from rlhf_ray.data.stream import Part
from rlhf_ray.loops.supervised import Batches, SplitEvaluator, Validated, train
from rlhf_ray.roles.supervised import SplitResult
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.supervised_run import SupervisedRun


class Trainer:
    """Its weights are the number of steps taken; its validation losses are given."""

    devices = 1.0

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.weights = 0
        self.losses = list(losses)
        self.asked: list[tuple[list[int], float]] = []
        self.judged: list[tuple[str, int]] = []

    def step(self, rows: Sequence[int], lr: float) -> dict[str, float]:
        self.weights += 1
        self.asked.append((list(rows), lr))
        return {"loss": 1.0, "tokens": 5.0}

    def evaluate(self, split: str, limit: int | None = None) -> SplitResult:
        self.judged.append((split, self.weights))
        loss = self.losses[self.weights - 1] if split == "val" and self.weights else 9.0
        return SplitResult({"loss": loss}, {"histogram": [1, 2]})

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return [f"{self.weights}:{max_new_tokens}" for _ in prompts]

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights.json").write_text(json.dumps(self.weights))

    def load(self, folder: Path) -> None:
        self.weights = json.loads((folder / "weights.json").read_text())


def config(steps: int, **sections: dict) -> SFTConfig:
    tree = {
        "steps": steps,
        "model": {"path": "some/model"},
        "data": {"path": "rows.jsonl", "eval_size": 1},
        "learner": {"batch_size": 2, "lr": 1.0},
        "logging": {"loggers": []},
        **sections,
    }
    return parse_config(tree, SFTConfig, source="the test")


def run(settings: SFTConfig, trainer: Trainer, folder: Path, *, rows: int = 4, resume: bool = False) -> dict:
    recorder = SupervisedRun(settings, RunDirectory(folder, resume=resume))
    evaluator = SplitEvaluator(("train", "val"), ((1, 2),), ("prompt",), 7)
    try:
        return train(settings, trainer, Batches(rows, settings.learner.batch_size, settings.seed), evaluator, recorder)
    finally:
        recorder.close()


# ---- which rows -----------------------------------------------------------------------------------------------


def test_each_epoch_visits_every_row_once_and_batches_go_on_over_its_end():
    batches = Batches(count=3, batch_size=2, seed=0)
    drawn = [row for step in range(6) for row in batches.rows(step)]
    assert [sorted(drawn[i : i + 3]) for i in (0, 3, 6, 9)] == [[0, 1, 2]] * 4
    assert len({tuple(drawn[i : i + 3]) for i in (0, 3, 6, 9)}) > 1, "each epoch in an order of its own"
    assert batches.rows(4) == Batches(3, 2, seed=0).rows(4) and batches.per_epoch == 2


def test_plain_text_takes_its_share_of_each_batch():
    batches = Batches(count=6, batch_size=4, seed=0, plain_count=3, plain_batch=1)
    drawn = [batches.rows(step) for step in range(6)]
    assert all(sum(row >= 6 for row in rows) == 1 and len(rows) == 4 for rows in drawn)
    assert sorted(row for rows in drawn[:3] for row in rows if row >= 6) == [6, 7, 8]
    assert sorted(row for rows in drawn[:2] for row in rows if row < 6) == list(range(6)) and batches.per_epoch == 2


def test_the_rows_of_a_step_are_fixed_for_ever():
    # A resumed run must go on in the order it began with: these numbers may never change.
    assert [Batches(6, 4, 3, 3, 1).rows(step) for step in range(4)] == [
        [0, 5, 1, 7], [2, 4, 3, 8], [3, 0, 1, 6], [2, 4, 5, 7],
    ]  # fmt: skip
    assert [Batches(5, 3, 7).rows(step) for step in range(4)] == [[1, 2, 0], [3, 4, 3], [4, 1, 2], [0, 2, 3]]


def test_several_sources_are_drawn_by_weight_beside_plain_text():
    """4 rows of a and 8 of b, 3 to 1; then plain text. Of each batch of 5, one row is plain."""
    batches = Batches(12, 5, 0, plain_count=2, plain_batch=1, parts=(Part("a", 4, 3.0), Part("b", 8, 1.0)))
    drawn = [batches.rows(step) for step in range(8)]
    assert all([sum(row < 4 for row in rows), sum(4 <= row < 12 for row in rows)] == [3, 1] for rows in drawn)
    assert all(rows[4] >= 12 and len(rows) == 5 for rows in drawn) and batches.per_epoch == 3
    assert sorted(row for rows in drawn for row in rows if 4 <= row < 12) == list(range(4, 12))
    assert batches.progress(8) == {"source/a/epochs": 6.0, "source/b/epochs": 1.0}
    assert Batches(12, 5, 0).progress(8) == {}


# ---- what validation decides ----------------------------------------------------------------------------------


def test_what_counts_as_better():
    settings = ValidationConfig(patience=2, min_improvement=0.1)
    first = Validated().after(1.0, 10, settings)
    assert (first.best_loss, first.best_step, first.worse) == (1.0, 10, 0)
    hardly = first.after(0.95, 20, settings)
    assert (hardly.best_step, hardly.worse, hardly.gives_up(settings)) == (10, 1, False)
    assert hardly.after(0.95, 30, settings).gives_up(settings)
    assert hardly.after(0.85, 30, settings).worse == 0
    assert first.after(float("nan"), 20, settings).worse == 1
    assert not hardly.after(2.0, 30, settings).gives_up(ValidationConfig())


def test_it_stops_early_and_goes_back_to_the_best_weights(tmp_path):
    trainer = Trainer(losses=[5, 3, 4, 4, 1, 1])
    result = run(config(6, eval={"every": 1, "patience": 2}), trainer, tmp_path)
    assert len(trainer.asked) == 4 and trainer.weights == 2
    assert (result["kept_step"], result["stopped_early"]) == (2, True)
    assert result["after"]["val/loss"] == 3 and result["before"]["val/loss"] == 9
    assert result["after"]["samples"] == [{"prompt": "prompt", "completion": "2:7"}]
    assert result["after"]["val/histogram"] == [1, 2]


def test_without_keep_best_the_last_weights_stay(tmp_path):
    trainer = Trainer(losses=[5, 3, 4, 4])
    result = run(config(4, eval={"every": 1, "keep_best": False}), trainer, tmp_path)
    assert trainer.weights == result["kept_step"] == 4 and not result["stopped_early"]


def test_validation_after_each_epoch_and_at_the_end(tmp_path):
    trainer = Trainer(losses=[9, 8, 7, 6, 5])
    run(config(5), trainer, tmp_path)  # 4 rows in batches of 2
    assert [weights for split, weights in trainer.judged if split == "val"] == [0, 2, 4, 5, 5]


def test_the_rate_follows_its_schedule(tmp_path):
    trainer = Trainer(losses=[1] * 4)
    run(config(4, learner={"batch_size": 2, "lr": 1.0, "lr_warmup_steps": 2}), trainer, tmp_path)
    assert [lr for _, lr in trainer.asked] == [0.5, 1.0, 1.0, 0.5]


# ---- resume ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_rows_that_are_left_and_remembers_the_best(tmp_path):
    losses, settings = [5, 2, 3, 4, 6, 7], {"eval": {"every": 1}, "checkpoint": {"every": 1, "keep": 1}}
    whole = Trainer(losses)
    expected = run(config(6, **settings), whole, tmp_path / "whole", rows=5)
    first, second = Trainer(losses), Trainer(losses)

    class Stopped(Exception):
        pass

    def step(rows, lr, step=first.step):
        if first.weights == 4:
            raise Stopped
        return step(rows, lr)

    first.step = step
    with pytest.raises(Stopped):
        run(config(6, **settings), first, tmp_path / "parts", rows=5)
    result = run(config(6, **settings), second, tmp_path / "parts", rows=5, resume=True)
    assert first.asked + second.asked == whole.asked
    assert result == expected and result["kept_step"] == second.weights == 2


def test_patience_is_remembered_where_no_best_weights_are_kept(tmp_path, recwarn):
    settings = {"eval": {"every": 1, "patience": 3, "keep_best": False}, "checkpoint": {"every": 2, "keep": 1}}
    first, second = Trainer([1, 2, 3, 4, 5, 6]), Trainer([1, 2, 3, 4, 5, 6])
    first.losses[2] = None  # the run dies in its third validation
    with pytest.raises(TypeError):
        run(config(6, **settings), first, tmp_path)
    result = run(config(6, **settings), second, tmp_path, resume=True)
    assert result["stopped_early"] and second.weights == 4 and len(recwarn) == 0


def test_the_rows_of_a_step_are_in_its_metrics_file_once(tmp_path):
    run(config(3, eval={"every": 2}), Trainer([3, 2, 1]), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and [row.get("val/loss") for row in rows] == [None, 2, 1]
    assert rows[0]["perf/tokens_per_s"] > 0 and rows[0]["cost/hours"] > 0
