import json

import pytest

from rlhf_ray.errors import ConfigError, StorageError
from rlhf_ray.run.directory import LOCK, RunDirectory, newest_run


def test_the_default_folder_is_name_and_time(tmp_path):
    run = RunDirectory.open("my run/1", root=tmp_path)
    assert run.path.parent == tmp_path and run.path.name.startswith("my_run_1-20")
    assert not run.resumed
    run.write_config("name: x\n")
    assert RunDirectory.open("my run/1", root=tmp_path).path != run.path, "two runs in one second"


def test_two_runs_never_share_a_folder(tmp_path):
    RunDirectory(tmp_path / "a").write_config("name: a\n")
    with pytest.raises(ConfigError, match="holds another run.*--resume auto"):
        RunDirectory(tmp_path / "a")
    assert RunDirectory(tmp_path / "a", resume=True).resumed


def test_a_place_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="no folder can be made there .Not a directory.; set --run-dir to another"):
        RunDirectory(tmp_path / "file" / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunDirectory(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        RunDirectory(tmp_path / "x")


def test_an_empty_folder_and_resume_without_a_run_start_anew(tmp_path):
    assert not RunDirectory(tmp_path, resume=True).resumed
    run = RunDirectory.open("never-ran", root=tmp_path / "runs", resume=True)
    assert not run.resumed and run.path.name.startswith("never-ran-")


def test_resume_takes_the_newest_run_of_the_same_name(tmp_path):
    for folder in ("a-20250102-000000", "a-20250101-000000", "a-b-20250103-000000", "a-20250104-000000-x"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text("")
    (tmp_path / "a-20250105-000000").mkdir()  # nothing in it: never started
    assert newest_run("a", tmp_path).name == "a-20250102-000000"
    assert RunDirectory.open("a", root=tmp_path, resume=True).path.name == "a-20250102-000000"
    assert newest_run("c", tmp_path) is None


def test_rewind_forgets_the_steps_that_will_be_run_again(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.write_config("name: a\n")
    for step in (1, 2, 3, 4):
        run.log_metrics(step, {"reward/mean": step / 10})
        run.write_rollouts(step, [{"prompt": "2+2=", "completion": "4", "reward": 1.0}])
    run.event("alarm", kind="test")
    run.write_summary({"status": "done"})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 5, "rewa')  # killed here

    run = RunDirectory(tmp_path / "a", resume=True)
    run.rewind(2)
    assert run.read_metrics() == [{"step": 1, "reward/mean": 0.1}, {"step": 2, "reward/mean": 0.2}]
    assert sorted(p.name for p in run.rollouts.iterdir()) == ["step_1.jsonl", "step_2.jsonl"]
    events = ["alarm", "lines_lost", "resumed"]
    assert [e["event"] for e in run.read_events()] == events, "events did happen, and stay"
    assert run.read_events()[-1]["step"] == 2
    assert not run.summary_file.exists()
    run.log_metrics(3, {"reward/mean": 0.5})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]


def test_a_resumed_run_with_other_settings_is_noticed(tmp_path):
    RunDirectory(tmp_path / "a").write_config("name: a\nlr: 1\nseed: 0\n")
    run = RunDirectory(tmp_path / "a", resume=True)
    run.write_config("name: a\nlr: 1\nseed: 0\n")
    assert run.read_events() == []
    run.write_config("name: a\nlr: 2\nseed: 0\n")
    assert run.read_events()[0]["changes"] == ["-lr: 1", "+lr: 2"]
    assert "lr: 2" in run.config_file.read_text()


def test_summary_and_rollouts_are_plain_json(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_summary({"before": {"accuracy": 0.4}, "after": {"accuracy": 0.9}, "seconds": 12.5, "status": "done"})
    assert json.loads(run.summary_file.read_text())["after"] == {"accuracy": 0.9} == run.read_summary()["after"]
    path = run.write_rollouts(7, [{"completion": "line\nbreak ✓", "reward": None}, {"completion": ""}])
    assert path.name == "step_7.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"completion": "line\nbreak ✓", "reward": None}, {"completion": ""}]


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_ended_before_its_first_step_makes_room(tmp_path, status):
    run = RunDirectory(tmp_path / "a")
    run.write_config("name: a\n")
    run.start.mkdir()
    run.write_summary({"status": status, "steps": 0})
    (run.path / "notes.txt").write_text("mine")
    assert not RunDirectory(run.path).resumed
    left = {p.name for p in run.path.iterdir()} - {LOCK}
    assert left == {"notes.txt"}, "what the run wrote is gone, nothing else"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("summary", "checkpoint"),
    [({"status": "failed", "steps": 1}, False), ({"status": "failed", "steps": 0}, True), (None, False),
     ({"status": "finished", "steps": 0}, False)],
)  # fmt: skip
def test_a_run_with_something_to_lose_does_not(tmp_path, summary, checkpoint, resume):
    run = RunDirectory(tmp_path / "a")
    run.write_config("name: a\n")
    if summary:
        run.write_summary(summary)
    if checkpoint:
        (run.checkpoints / "step_1").mkdir(parents=True)
    if resume:
        assert RunDirectory(run.path, resume=True).resumed
    else:
        with pytest.raises(ConfigError, match="holds another run"):
            RunDirectory(run.path)
    assert run.config_file.exists()


def test_the_newest_run_is_none_that_failed_at_its_start(tmp_path):
    for folder in ("a-20250101-000000", "a-20250102-000000"):
        run = RunDirectory(tmp_path / folder)
        run.write_config("name: a\n")
    run.write_summary({"status": "failed", "steps": 0})
    assert newest_run("a", tmp_path).name == "a-20250101-000000"
    run.write_summary({"status": "interrupted", "steps": 0})
    assert newest_run("a", tmp_path).name == "a-20250102-000000", "a warm start may be what somebody wants to keep"
