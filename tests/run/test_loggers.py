import json
import math
import threading
import time

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.run import loggers as module
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.loggers import Background, Metrics
from rlhf_ray.run.observer import StepRecord


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


class Recording:
    def __init__(self):
        self.rows, self.closed = [], False

    def log(self, step, metrics):
        self.rows.append((step, metrics))

    def close(self):
        self.closed = True


class Failing(Recording):
    def log(self, step, metrics):
        raise ConnectionError("no route to host")


def use(monkeypatch, **loggers):
    for name, logger in loggers.items():
        monkeypatch.setitem(module.LOGGERS, name, lambda run, config, step, logger=logger: logger)


def test_jsonl_rows(run):
    metrics = Metrics(run, ["jsonl"])
    metrics.log(1, {"reward/mean": torch.tensor(0.5), "groups/mixed": 3, "kl_ref": math.nan})
    metrics.close()
    assert run.metrics_file.read_text() == '{"step": 1, "reward/mean": 0.5, "groups/mixed": 3, "kl_ref": "NaN"}\n'


def test_an_unknown_logger_is_a_config_error(run):
    with pytest.raises(ConfigError, match=r"'tensorbord' is unknown; it must be one of jsonl, tensorboard, wandb"):
        Metrics(run, ["tensorbord"])


def test_a_logger_that_fails_is_switched_off_once_and_the_others_go_on(run, monkeypatch):
    good = Recording()
    use(monkeypatch, wandb=Failing(), trackio=good)
    metrics = Metrics(run, ["wandb", "jsonl", "trackio"])
    with pytest.warns(UserWarning, match="logger wandb is switched off.*no route to host"):
        metrics.log(1, {"x": 1.0})
    metrics.log(2, {"x": 2.0})
    metrics.close()
    assert good.rows == [(1, {"x": 1.0}), (2, {"x": 2.0})] and good.closed
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    (event,) = run.read_events()
    assert (event["event"], event["logger"]) == ("logger_disabled", "wandb")


def test_a_logger_whose_package_is_missing_says_what_to_install(run, monkeypatch):
    def make(run, config, step):
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    monkeypatch.setitem(module.LOGGERS, "mlflow", make)
    with pytest.warns(UserWarning, match="pip install mlflow"):
        metrics = Metrics(run, ["jsonl", "mlflow"])
    metrics.log(1, {"x": 1.0})
    assert [row["step"] for row in run.read_metrics()] == [1], "the other goes on"


def test_even_metrics_jsonl_may_fail(run, monkeypatch):
    metrics = Metrics(run, ["jsonl"])
    run.metrics_file.mkdir()
    with pytest.warns(UserWarning, match="logger jsonl is switched off"):
        metrics.log(1, {"x": 1.0})
    run.metrics_file.rmdir()
    metrics.log(2, {"x": 1.0})
    assert not run.metrics_file.exists(), "switched off"


class Stuck(Recording):
    def __init__(self):
        super().__init__()
        self.release = threading.Event()

    def log(self, step, metrics):
        self.release.wait(60)


def test_a_server_that_hangs_holds_up_neither_a_step_nor_the_end():
    stuck = Stuck()
    logger = Background(lambda: stuck, waiting=2, patience=0.2)
    started = time.monotonic()
    logger.log(1, {})
    while not logger._queue.empty():  # until the thread is stuck in step 1
        time.sleep(0.001)
    logger.log(2, {})
    logger.log(3, {})
    with pytest.raises(TimeoutError, match="2 steps wait to be sent"):
        logger.log(4, {})
    with pytest.raises(TimeoutError):
        logger.close()
    assert time.monotonic() - started < 5
    stuck.release.set()


def test_in_the_background_everything_arrives_in_order_and_errors_come_back():
    good = Recording()
    logger = Background(lambda: good)
    for step in range(100):
        logger.log(step, {"x": 1.0})
    logger.close()
    assert [step for step, _ in good.rows] == list(range(100)) and good.closed
    failing = Background(Failing)
    failing.log(1, {})
    with pytest.raises(ConnectionError, match="no route to host"):
        failing.close()


@pytest.mark.slow
def test_tensorboard_shows_the_steps_and_hides_those_before_a_resume(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Metrics(run, ["tensorboard"])
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": step / 10, "nan": math.nan})
    first.close()
    second = Metrics(run, ["tensorboard"], resume_step=2)
    second.log(3, {"reward/mean": 0.9})
    second.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("reward/mean")] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_rows_are_on_disk_after_each_step(run):
    metrics = Metrics(run, ["jsonl"])
    metrics.log(1, {"x": 0.25})
    assert json.loads(run.metrics_file.read_text()) == {"step": 1, "x": 0.25}, "without close: a kill loses nothing"


def test_what_went_wrong_in_a_step_is_an_event_of_its_own_kind(run):
    left_out = {"kind": "not_finite", "step": 1, "worker": "generator 1", "prompts": [4]}
    failed = {"step": 1, "reward": "exact", "reason": "no number"}
    module.Recorder(run, 0).step(StepRecord(1, 2, {}, (), (left_out, failed)))
    told = [{name: value for name, value in event.items() if name != "time"} for event in run.read_events()]
    assert told == [
        {"event": "not_finite", "step": 1, "worker": "generator 1", "prompts": [4]},
        {"event": "reward_failed", **failed},
    ]  # fmt: skip
