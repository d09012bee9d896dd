"""What a run keeps of its bad steps, how many, and what happens where it cannot."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_ray.errors import DataError, DivergenceError, WorkerError
from rlhf_ray.roles.batch import Batch, batch_of
from rlhf_ray.roles.protocols import HERE, Scores
from rlhf_ray.run.bad_steps import BadStep, BadSteps
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.sample import Sample


@pytest.fixture
def run(tmp_path):
    notes = []
    return SimpleNamespace(directory=RunDirectory(tmp_path / "run"), note=notes.append, notes=notes)


@pytest.fixture
def batch() -> Batch:
    samples = [Sample.answer(7, row, [3, 4], [5, 6][: row + 1], [-0.5, -1.0][: row + 1], 2, "stop") for row in (0, 1)]
    return batch_of(samples, [{"answer": 1}] * 2, [None] * 2)


SCORES = Scores(torch.tensor([1.0, float("nan")]), {"judge": torch.tensor([1.0, float("nan")])}, (("p", "one"),))


def watched(steps: BadSteps, step: int, batch: Batch, error: Exception | None = None, **metrics: float) -> None:
    with steps.watch(step, batch, SCORES, 0.25, metrics):
        if error:
            raise error


def kept(run) -> list[str]:
    return sorted(path.name for path in (run.directory.path / "bad_steps").glob("*"))


def test_there_and_back(run, batch):
    shared = torch.tensor([[0.0, 0.0, -0.5, 0.0], [0.0, 0.0, float("nan"), -1.0]])
    batch = batch.replace(logp_old=shared, logp_ref=shared, score=SCORES.score)
    watched(BadSteps(run, HERE), 3, batch, skipped_steps=1.0)
    found = BadStep.read(run.directory.path / "bad_steps" / "step_3")
    assert (found.step, found.kl_coef, found.why) == (3, 0.25, "skipped: an optimiser step had no finite gradient")
    for name in ("tokens", "response_mask", "logp_gen", "logp_old", "logp_ref", "score", "prompt_id", "truncated"):
        torch.testing.assert_close(getattr(found.batch, name), getattr(batch, name), rtol=0, atol=0, equal_nan=True)
    assert found.batch.values is None and found.batch.rows == batch.rows
    assert "rlhf-ray replay" in run.notes[0] and run.directory.read_events()[-1]["event"] == "bad_step_kept"


def test_the_first_skipped_one_and_the_last_that_diverged_stay(run, batch):
    steps = BadSteps(run, HERE)
    watched(steps, 1, batch, skipped_steps=0.0)
    assert kept(run) == []
    watched(steps, 2, batch, **{"critic/skipped_steps": 1.0})
    watched(steps, 3, batch, skipped_steps=4.0)
    assert kept(run) == ["step_2"]
    for step in (5, 7, 10):
        with pytest.raises(DivergenceError):
            watched(steps, step, batch, DivergenceError("no more"))
    with pytest.raises(ValueError, match="another"):
        watched(steps, 11, batch, ValueError("another"), skipped_steps=1.0)
    assert kept(run) == ["step_10", "step_2", "step_7"]


def test_a_batch_that_is_lost_hides_nothing(run, batch):
    def fetch(batch):
        raise WorkerError("generator 0 is gone")

    with pytest.raises(DivergenceError, match="no more"):
        watched(BadSteps(run, SimpleNamespace(fetch=fetch)), 5, batch, DivergenceError("no more"))
    assert kept(run) == [] and "generator 0 is gone" in run.notes[0]
    event = run.directory.read_events()[-1]
    assert (event["event"], event["step"]) == ("bad_step_lost", 5)


def test_what_is_none_or_damaged_is_refused(run, batch):
    with pytest.raises(DataError, match="holds no step that a run has kept"):
        BadStep.read(run.directory.path)
    watched(BadSteps(run, HERE), 3, batch, skipped_steps=1.0)
    folder = run.directory.path / "bad_steps" / "step_3"
    for name in ("batch.safetensors", "step.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="or a damaged one"):
            BadStep.read(folder)
        (folder / name).write_bytes(whole)
    BadStep.read(folder)
