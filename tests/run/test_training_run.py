"""What a step leaves behind."""

import json
import re
import signal
from datetime import datetime, timedelta

import pytest
import torch
import yaml

from rlhf_ray.config.load import dump_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import DPOConfig, SFTConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.size import Size
from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Scores
from rlhf_ray.run.cost import Workload
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.loggers import rollout_rows
from rlhf_ray.run.observer import Observer
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.training_run import TrainingRun

ROWS = Rows(
    prompt_id=(3, 3), lengths=(5, 3), response_lengths=(4, 2), truncated=(True, False), weight_version=(0, 0),
    prompt_lengths=(1, 1), prompt_digests=(8, 8),
)  # fmt: skip
SCORES = Scores(torch.tensor([1.0, 0.5]), {"exact": torch.tensor([1.0, 0.0])}, (("p", "one"), ("p", "two")))


def weights(folder) -> None:
    (folder / "weights").write_text("w")


def settings(**changes) -> RunConfig:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "logging": {"loggers": [], "samples_every": 2}}
    return RunConfig.model_validate({**tree, **changes})


@pytest.fixture
def recorder(tmp_path, clock):
    def make(resume: bool = False, observers=(), **changes) -> TrainingRun:
        directory = RunDirectory(tmp_path / "run", resume=resume)
        return TrainingRun(settings(**changes), directory, observers=observers, clock=clock)

    return make


def test_a_step(recorder, clock, tmp_path):
    run = recorder()
    with run.timer("step"):
        clock.now += 1.5
        with run.timer("generate"):
            clock.now += 0.5
    run.log(1, {"reward/mean": 0.75}, ROWS, SCORES)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row.pop("cost/hours") == row["cost/device_hours"] == pytest.approx(2 / 3600)
    nothing = {name: 0 for name in row if name.startswith(("fault/", "dropped_", "time/"))}
    assert nothing.keys() >= {"fault/restarts", "fault/retries", "fault/dropped", "dropped_stale", "time/wait"}
    assert row == {
        **nothing, "step": 1, "reward/mean": 0.75, "time/step": 2, "time/generate": 0.5, "perf/tokens_per_s": 4,
        "perf/samples_per_s": 1, "cost/device_hours": row["cost/device_hours"],
    }  # fmt: skip
    assert run.timer.take() == {}, "the next step starts from 0"
    assert (tmp_path / "run" / "rollouts" / "step_1.jsonl").read_text().count("\n") == 2
    assert "path: m" in (tmp_path / "run" / "config.yaml").read_text()


def test_what_a_role_counts_is_not_covered_up(recorder, tmp_path):
    run = recorder()
    run.log(1, {"fault/retries": 2, "time/reward": 0.5}, ROWS, SCORES)
    row = run.directory.read_metrics()[0]
    assert (row["fault/retries"], row["fault/restarts"], row["time/reward"]) == (2, 0, 0.5)


def test_device_hours_and_utilisation(recorder, clock):
    run = recorder()
    clock.now += 36
    # 10 parameters: 2 x 10 to generate, 6 x 10 to train, 8 tokens, in 2 s, on 4 devices of 20 FLOP/s
    run.workload = Workload(Size(10, 10), devices=4, peak_flops=20.0)
    run.timer.add("step", 2.0)
    run.log(1, {}, ROWS, SCORES)
    row = run.directory.read_metrics()[0]
    assert row["perf/mfu"] == pytest.approx(8 * 80 / (2 * 4 * 20))
    assert row["cost/hours"] == pytest.approx(0.01) and row["cost/device_hours"] == pytest.approx(0.04)


def test_rollout_rows():
    assert rollout_rows(ROWS, SCORES, 1) == [{
        "prompt_id": 3, "prompt": "p", "completion": "one", "reward": 1.0, "rewards": {"exact": 1.0}, "tokens": 4,
        "truncated": True,
    }]  # fmt: skip
    assert len(rollout_rows(ROWS, SCORES, 5)) == 2
    assert [row["source"] for row in rollout_rows(ROWS, SCORES, 5, ("math", "talk"))] == ["math", "talk"]


def test_rollouts_may_be_switched_off(recorder, tmp_path):
    run = recorder(logging={"loggers": [], "rollouts": 0})
    run.log(1, {}, ROWS, SCORES)
    assert not (tmp_path / "run" / "rollouts").exists()


def test_samples_are_shown_every_so_often(recorder, capsys):
    run = recorder()
    for step in (1, 2, 3):
        run.log(step, {}, ROWS, SCORES)
    assert capsys.readouterr().out.count("[1.000] p -> one") == 1


def test_an_alarm_is_a_line_and_an_event(recorder, capsys):
    run = recorder()
    run.alarm("mismatch", "the weights differ", 4)
    assert "ALARM step 4: mismatch: the weights differ\n" in capsys.readouterr().out
    event = run.directory.read_events()[-1]
    assert (event["event"], event["kind"], event["reason"], event["step"]) == (
        "alarm", "mismatch", "the weights differ", 4,
    )  # fmt: skip


def test_skipped_steps_are_an_alarm(recorder, capsys):
    run = recorder()
    run.log(1, {"skipped_steps": 0.0, "critic/skipped_steps": 0.0}, ROWS, SCORES)
    run.log(2, {"skipped_steps": 1.0, "critic/skipped_steps": 2.0}, ROWS, SCORES)
    assert "ALARM step 2: skipped: 3 optimiser steps had no finite gradient" in capsys.readouterr().out
    assert [(e["kind"], e["step"]) for e in run.directory.read_events() if e["event"] == "alarm"] == [("skipped", 2)]


def test_what_is_remembered_is_measured_once(recorder):
    assert recorder().remember("before", lambda: {"accuracy": 0.5}) == {"accuracy": 0.5}
    resumed = recorder(resume=True)
    assert resumed.remember("before", lambda: pytest.fail("again")) == {"accuracy": 0.5}
    assert resumed.remember("other", lambda: {"x": 1}) == {"x": 1}


def test_the_end(recorder, clock, tmp_path):
    run = recorder()
    clock.now += 36
    run.log(1, {}, ROWS, SCORES)
    run.finish("finished", before={"accuracy": 0.1}, after={"accuracy": 0.9})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.pop("seconds") == 36 and summary.pop("device_hours") == pytest.approx(0.01)
    assert summary == {
        "name": "run", "run_dir": str(tmp_path / "run"), "status": "finished", "steps": 1,
        "before": {"accuracy": 0.1}, "after": {"accuracy": 0.9},
    }  # fmt: skip


def test_going_on_from_a_checkpoint(recorder, tmp_path):
    run = recorder(steps=5)
    for step in (1, 2, 3):
        run.log(step, {}, ROWS, SCORES)
        if step == 2:
            run.checkpoints.save(2, weights, {"kl": 0.5})
    resumed = recorder(resume=True, steps=5)
    assert resumed.resume_point.step == 2 and resumed.resume_point.state == {"kl": 0.5}
    assert resumed.steps_done == 2
    assert [row["step"] for row in resumed.directory.read_metrics()] == [1, 2], "step 3 will be written again"


def test_going_back_to_a_checkpoint_in_mid_run(recorder, clock, tmp_path):
    """As a resumed run does, and observers hear of it. Then step 3 again, which is as far as it was, 2 s later."""
    told: list[int] = []

    class Watcher(Observer):
        def rewind(self, step: int) -> None:
            told.append(step)

    run = recorder(steps=5, observers=[Watcher()])
    run.remember("before", lambda: {"reward": 1.0})
    for step in (1, 2, 3):
        run.log(step, {}, ROWS, SCORES)
        if step == 2:
            run.checkpoints.save(2, weights, {"kl": 0.5})
    run.go_back({"detect": 1.0, "start": 4.0})
    assert (run.resume_point.step, run.resume_point.state, run.steps_done, told) == (2, {"kl": 0.5}, 2, [2])
    assert [row["step"] for row in run.directory.read_metrics()] == [1, 2]
    assert run.remember("before", lambda: {"reward": 2.0}) == {"reward": 1.0}
    clock.now += 2
    run.log(3, {}, ROWS, SCORES)
    rewound, caught_up = [row for row in run.directory.read_events() if row["event"] in ("rewound", "caught_up")]
    assert (rewound["step"], rewound["steps_again"]) == (2, 1)
    assert [caught_up[f"{name}_s"] for name in ("detect", "start", "replay")] == [1, 4, 2]


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(recorder):
    run = recorder(steps=5)
    run.log(1, {}, ROWS, SCORES)
    run.go_back({})
    assert (run.resume_point, run.steps_done, run.directory.read_metrics()) == (None, 0, [])


def test_resume_without_a_checkpoint_starts_at_0(recorder):
    recorder().log(1, {}, ROWS, SCORES)
    resumed = recorder(resume=True)
    assert resumed.resume_point is None and resumed.directory.read_metrics() == []


@pytest.mark.parametrize("name", ["seed", "model", "warm_start"])
def test_settings_that_made_the_policy_cannot_change(recorder, name):
    recorder()
    other = {"seed": 9, "model": {"path": "another"}, "warm_start": {"steps": 3}}
    with pytest.raises(ConfigError, match=f"{name} has changed since it was made .*set it back, or start anew"):
        recorder(resume=True, **{name: other[name]})


@pytest.mark.parametrize(("changes", "named"), [
    ({"rollout": {"prompts_per_step": 16}}, "rollout.prompts_per_step has"),
    ({"rollout": {"group_size": 4}}, "rollout.group_size has"),
    ({"data": {"path": "other", "split": "test", "limit": 3}}, "data.path, data.limit, data.split have"),
    ({"data": {"path": "d", "eval_size": 3}}, "data.eval_size has"),  # the held-out rows are cut off the prompts
    ({"data": {"path": "d", "max_prompt_tokens": 9, "overlong_prompts": "drop"}}, "data.overlong_prompts have"),
])  # fmt: skip
def test_settings_that_order_the_prompts_cannot_change(recorder, changes, named):
    recorder()
    with pytest.raises(ConfigError, match=f"in the stream of prompts .*{named} changed since.*set it back, or start"):
        recorder(resume=True, **changes)


def test_the_batches_of_a_supervised_run_cannot_change(tmp_path):
    def start(batch_size: int, resume: bool) -> None:
        tree = {"model": {"path": "m"}, "data": {"path": "d"}, "learner": {"batch_size": batch_size},
                "logging": {"loggers": []}}  # fmt: skip
        TrainingRun(SFTConfig.model_validate(tree), RunDirectory(tmp_path / "run", resume=resume))

    start(8, resume=False)
    start(8, resume=True)
    with pytest.raises(ConfigError, match="learner.batch_size has changed since"):
        start(4, resume=True)


def test_the_reference_of_a_dpo_run_cannot_change_once_it_was_asked(tmp_path):
    def start(reference: str | None, resume: bool) -> TrainingRun:
        tree = {"model": {"path": "m"}, "data": {"path": "d"}, "dpo": {"reference": reference},
                "logging": {"loggers": []}}  # fmt: skip
        return TrainingRun(DPOConfig.model_validate(tree), RunDirectory(tmp_path / "run", resume=resume))

    start(None, resume=False)
    start("other", resume=True).remember("reference", dict)
    with pytest.raises(ConfigError, match="the log-probabilities in reference.json, and dpo.reference has changed"):
        start(None, resume=True)
    start("other", resume=True)


def test_what_a_critic_began_as_cannot_change_once_it_has_learned(recorder):
    ppo = {"algorithm": {"name": "ppo"}}
    recorder(**ppo)
    run = recorder(resume=True, critic={"path": "one"}, **ppo)
    run.checkpoints.save(1, weights, {})
    with pytest.raises(ConfigError, match="the critic of the checkpoint, and critic.path has changed since it was"):
        recorder(resume=True, critic={"path": "two"}, **ppo)
    recorder(resume=True, critic={"path": "one"}, **ppo)


def test_everything_that_cannot_change_is_named_at_once(recorder):
    recorder()
    with pytest.raises(ConfigError, match="seed has changed since it was made; it also goes on in the stream"):
        recorder(resume=True, seed=5, rollout={"group_size": 2})


def test_what_leaves_the_prompts_as_they_are_may_change(recorder):
    recorder()
    run = recorder(resume=True, data={"path": "d", "max_prompt_tokens": 9}, rollout={"temperature": 0.5})
    tree = yaml.safe_load(run.directory.config_file.read_text())
    del tree["data"]["overlong_prompts"], tree["rollout"]["group_size"]  # written by a version that had no such setting
    run.directory.config_file.write_text(yaml.safe_dump(tree))
    recorder(resume=True, data={"path": "d", "max_prompt_tokens": 9})


@pytest.mark.parametrize(("saved", "every", "says"), [
    (2, 2, "interrupted after step 3 of 9; the same command with --resume auto goes on from the checkpoint of step 2"),
    (0, 50, "3 of 9, before its first checkpoint .the first is due after step 50.: .* auto begins again at step 0$"),
    (0, 0, "before its first checkpoint .checkpoint.every=0 makes one at the end only.: .*begins again at step 0$"),
])  # fmt: skip
def test_an_interrupted_run_says_what_will_happen(recorder, capsys, saved, every, says):
    run = recorder(steps=9, checkpoint={"every": every})
    for step in (1, 2, 3):
        run.log(step, {}, ROWS, SCORES)
    if saved:
        run.checkpoints.save(saved, weights, {})
    run.fail(KeyboardInterrupt())
    assert re.search(says, capsys.readouterr().out.splitlines()[-1])
    summary = run.directory.read_summary()
    assert (summary["status"], summary["steps"]) == ("interrupted", 3) and "error" not in summary


def test_seconds_are_those_of_all_parts(recorder, clock):
    first = recorder()
    clock.now += 60
    first.fail(KeyboardInterrupt())
    second = recorder(resume=True)
    clock.now += 5
    second.log(1, {}, ROWS, SCORES)  # then killed: the row is all it left
    third = recorder(resume=True)
    clock.now += 30
    third.finish("finished")
    assert third.directory.read_summary()["seconds"] == 60 + 5 + 30


def test_other_settings_may_change_and_are_noted(recorder):
    run = recorder()
    resumed = recorder(resume=True, learner={"lr": 0.5})
    changes = [e["changes"] for e in resumed.directory.read_events() if e["event"] == "config_changed"]
    assert changes == [["-  lr: 1.0e-06", "+  lr: 0.5"]]
    assert run.directory.config_file.read_text() == dump_config(resumed.config)


# ---- what a resumed run must find as it was ---------------------------------------------------------------------


def with_rows(tmp_path, resume: bool = False, config: RunConfig | None = None, **rows: str) -> TrainingRun:
    return TrainingRun(config or settings(), RunDirectory(tmp_path / "run", resume=resume), rows)


def events_of(run: TrainingRun, kind: str) -> list[str]:
    return [event["reason"] for event in run.directory.read_events() if event["event"] == kind]


def test_rows_that_have_changed_are_refused_by_name_once_something_was_made_of_them(tmp_path, capsys):
    with_rows(tmp_path, train="9 rows aa", test="4 rows bb")
    assert not events_of(with_rows(tmp_path, resume=True, train="9 rows aa", test="4 rows bb"), "data_changed")
    early = with_rows(tmp_path, resume=True, train="8 rows cc", test="4 rows bb")
    (said,) = events_of(early, "data_changed")
    assert said.endswith("nothing was made from it yet: train (9 rows then, 8 now)") and said in capsys.readouterr().out
    early.remember("before", dict)
    kept = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    with pytest.raises(DataError, match=r"run: the data has changed .*: test \(4 rows as before, with other content"):
        with_rows(tmp_path, resume=True, train="8 rows cc", test="4 rows dd")
    assert {path.name: path.read_text() for path in (tmp_path / "run").glob("*.*") if path.is_file()} == kept
    with_rows(tmp_path, resume=True, train="8 rows cc", test="4 rows bb")


def test_a_source_that_is_new_and_a_run_that_kept_no_fingerprints_are_told(tmp_path):
    first = with_rows(tmp_path, train="9 rows aa")
    first.remember("before", dict)
    (said,) = events_of(with_rows(tmp_path, resume=True, train="9 rows aa", other="1 rows bb"), "data_changed")
    assert said.endswith("cannot be compared: other")
    first.directory.data_file.unlink()  # as a version left it that wrote none
    (_, said) = events_of(with_rows(tmp_path, resume=True, train="8 rows cc"), "data_changed")
    assert said.startswith("this run kept no fingerprint of its data")
    with pytest.raises(DataError, match="the data has changed"):
        with_rows(tmp_path, resume=True, train="9 rows aa")


def test_another_length_is_told(tmp_path, capsys):
    def start(resume: bool, **changes) -> TrainingRun:
        tree = {"model": {"path": "m"}, "data": {"path": "d"}, "logging": {"loggers": []}, "steps": 20, "epochs": 2}
        return TrainingRun(SFTConfig.model_validate(tree | changes), RunDirectory(tmp_path / "run", resume=resume))

    start(False)
    assert not events_of(start(True), "length_changed")
    (said,) = events_of(start(True, epochs=3, steps=30), "length_changed")
    assert "epochs 2.0 -> 3.0, steps 20 -> 30; what moves over the run (learner.lr_schedule=linear, " in said
    assert "learner.lr_warmup_ratio=0.03) is from here on" in said
    assert said in capsys.readouterr().out


def test_another_length_tells_of_every_setting_that_moves_over_the_run(tmp_path):
    def start(resume: bool, **changes) -> TrainingRun:
        tree = {"model": {"path": "m"}, "data": {"path": "d"}, "logging": {"loggers": []},
                "learner": {"lr_warmup_steps": 3}}  # fmt: skip
        return TrainingRun(RunConfig.model_validate(tree | changes), RunDirectory(tmp_path / "run", resume=resume))

    start(False, steps=20)
    (said,) = events_of(start(True, steps=30), "length_changed")
    assert said == "the run's length has changed since it began: steps 20 -> 30"
    moving = {"rollout": {"temperature_end": 0.5}, "algorithm": {"kl_coef_end": 0.0, "entropy_coef_end": 0.1}}
    said = events_of(start(True, steps=40, **moving), "length_changed")[-1]
    assert "(rollout.temperature_end=0.5, algorithm.kl_coef_end=0.0, algorithm.entropy_coef_end=0.1)" in said
    said = events_of(start(True, steps=50, learner={"lr_warmup_ratio": 0.1}), "length_changed")[-1]
    assert "(learner.lr_warmup_ratio=0.1)" in said, "and not that of a critic which is not there"


def test_a_resumed_run_keeps_the_moment_of_its_start(tmp_path):
    first = RunDirectory(tmp_path / "run")
    moment = datetime(2020, 2, 3, 4, 5, 6)
    TrainingRun(frozen_clock(settings(clock=moment), first), first)
    again = RunDirectory(tmp_path / "run", resume=True)
    assert frozen_clock(settings(), again).clock == moment
    with pytest.raises(ConfigError, match="the date that they had at its start, and clock has changed since"):
        TrainingRun(frozen_clock(settings(clock=datetime(2021, 1, 1)), again), again)
    tree = yaml.safe_load(first.config_file.read_text())
    del tree["clock"]  # an older version
    first.config_file.write_text(yaml.safe_dump(tree))
    started = datetime.fromisoformat(first.read_events()[0]["time"])
    assert frozen_clock(settings(), again).clock == started
    assert datetime.now() - frozen_clock(settings(), RunDirectory(tmp_path / "new")).clock < timedelta(minutes=1)


@pytest.mark.parametrize(("when", "saved"), [
    ("in the step", [2, 3]), ("after the question", [2, 4]), ("while the regular one is written", [2, 3]),
    ("while the last one is written", [2, 4, 5]),
])  # fmt: skip
def test_a_stop_never_comes_without_its_checkpoint(recorder, capfd, when, saved):
    """Whenever the signal comes: steps 2 and 4 of 5 have one anyhow. The run ends after the last that is `saved`."""
    run, made = recorder(steps=5, checkpoint={"every": 2}), []
    before = signal.getsignal(signal.SIGINT)

    def here(moment: str, at: int) -> None:
        if (moment, at) == {"in the step": ("step", 3), "after the question": ("asked", 3),
                            "while the regular one is written": ("save", 2),
                            "while the last one is written": ("save", 5)}[when]:  # fmt: skip
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        for step in run.steps(0):
            here("step", step + 1)
            due = run.is_checkpoint_due(step + 1)
            here("asked", step + 1)
            if due:
                here("save", step + 1)
                made.append(step + 1)
    assert made == saved and signal.getsignal(signal.SIGINT) is before


def test_after_a_loop_that_leaves_early_signals_do_what_they_did(recorder):
    before = signal.getsignal(signal.SIGINT)
    for _ in recorder(steps=5).steps(0):
        assert signal.getsignal(signal.SIGINT) is not before
        break
    assert signal.getsignal(signal.SIGINT) is before
