"""A run whose ranks are lost goes back to its newest checkpoint. Here nobody dies: the error is raised by hand."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import RanksLostError
from rlhf_ray.loops.rewind import through_losses
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.rollout.ledger import TERMS
from rlhf_ray.run.stopping import Stop
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start import rl as start
from rlhf_ray.start.rl import run_rl


class FakeRun:
    """`went_back`: after how many steps."""

    def __init__(self, restarts: int) -> None:
        self.config = SimpleNamespace(ray=SimpleNamespace(restarts=restarts))
        self.steps_done, self.went_back, self.stop = 0, [], Stop()

    def go_back(self, seconds: dict[str, float]) -> None:
        assert seconds == {"start": 1.0}
        self.went_back.append(self.steps_done)
        self.steps_done = 0


def ends(run: FakeRun, done_at_losses: list[int]) -> str:
    """Attempts that are lost after so many steps, and then one that is not."""
    losses = iter(done_at_losses)

    def attempt() -> str:
        if (done := next(losses, None)) is None:
            return "the end"
        run.steps_done = done
        raise RanksLostError("learner rank 1 died")

    return through_losses(attempt, run, lambda: {"start": 1.0})


def test_a_step_that_kills_its_ranks_again_and_again_ends_the_run():
    run = FakeRun(restarts=2)
    assert ends(run, [4, 4, 5, 5, 9]) == "the end" and run.went_back == [4, 4, 5, 5, 9]
    run = FakeRun(restarts=2)
    with pytest.raises(RanksLostError, match="rank 1 died; this was loss number 3 after step 4 .* ray.restarts=2"):
        ends(run, [4, 2, 4])
    assert run.went_back == [4, 2]


def test_a_run_that_was_to_stop_does_not_go_back():
    run = FakeRun(restarts=2)
    run.stop.requested = True
    with pytest.raises(KeyboardInterrupt):
        ends(run, [4])
    assert run.went_back == []


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_that_goes_back_ends_as_one_that_does_not(tiny_config, tmp_path, read_rows, monkeypatch, staleness):
    """Lost after step 4 and after step 5, each before its row is logged; checkpoints after steps 2, 4 and 6."""
    config = tiny_config("steps=6", "eval.size=2", "checkpoint.every=2", "algorithm.normalize_rewards=running")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_staleness": staleness})})
    monkeypatch.setattr(start, "on_device", lambda config, _: config)
    monkeypatch.setattr(start, "validated", lambda config: config)
    generate, one_at_a_time = HFGenerator.generate, threading.Lock()

    def as_an_actor(self: HFGenerator, *args: Any) -> Any:
        with one_at_a_time:
            return generate(self, *args)

    monkeypatch.setattr(HFGenerator, "generate", as_an_actor)
    monkeypatch.setattr(HFGenerator, "sleep", lambda self: None)  # in the midst of what another thread generates
    expected = run_rl(config, tmp_path / "calm")
    log, losses = TrainingRun.log, [4, 5]

    def lossy(self: TrainingRun, step: int, *args: Any) -> None:
        if losses and step == losses[0]:
            del losses[0]
            raise RanksLostError("learner rank 0 died")
        log(self, step, *args)

    monkeypatch.setattr(TrainingRun, "log", lossy)
    found = run_rl(config, tmp_path / "run")
    assert not losses and found["before"] == expected["before"] and found["after"] == expected["after"]
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("calm", "run")]
    assert weights[0] == weights[1], "bit for bit"
    rows, others = read_rows(tmp_path / "run"), ("ledger/sampled", "ledger/lost")
    books = [{name: row.pop(name) for name in list(row) if name.startswith(others)} for row in rows]
    for row in (calm := read_rows(tmp_path / "calm")):
        for name in books[0]:
            row.pop(name)
    assert rows == calm
    for row, counts in zip(rows, books, strict=True):
        for unit in ("", "_tokens"):
            both = row | counts
            assert both[f"ledger/sampled{unit}"] == sum(both[f"ledger/{term}{unit}"] for term in TERMS)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "rewound"] == [2, 4]
    # Steps 3 and 4, and step 5, of 16 answers each. Overlapped, checkpoints have what was written ahead, and how much
    # has been written beyond that is a matter of time.
    assert books[-1]["ledger/lost"] == 48 or (staleness and books[-1]["ledger/lost"] > 0)
