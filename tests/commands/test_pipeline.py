"""The order of stages, what is kept and what is run again. The commands themselves are replaced: they have tests."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf_ray.commands.pipeline import stages
from rlhf_ray.errors import ConfigError, StageError

STAGES = """
name: three
stages:
  - {name: a, run: sft, set: {model.path: m, data.path: rows.jsonl}}
  - {name: b, run: dpo, set: {model.path: "${a.model}", data.path: pairs.jsonl}}
  - {name: c, run: sft, set: {model.path: m, data.path: rows.jsonl}}
"""


class Shell:
    """Runs nothing: each command leaves a summary, unless its stage is in `failing`."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: dict[str, int] = {}
        self.clock = itertools.count(1_000_000_000)

    def run(self, command: list[str]) -> int:
        folder = Path(command[command.index("--run-dir") + 1])
        self.ran.append(folder.name + (" resumed" if "--resume" in command else ""))
        folder.mkdir(exist_ok=True)
        if folder.name in self.failing:
            return self.failing[folder.name]
        summary = folder / "summary.json"
        summary.write_text(json.dumps({"status": "finished", "seconds": 1.5}))
        stamp = next(self.clock)  # later stages are newer, however fast the machine is
        os.utime(summary, (stamp, stamp))
        return 0


@pytest.fixture
def shell(monkeypatch) -> Shell:
    shell = Shell()
    monkeypatch.setattr(stages, "run_command", shell.run)
    return shell


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "three.yaml").write_text(STAGES)
    return tmp_path / "three.yaml"


def test_stages_run_in_order(shell, file, tmp_path):
    summary = stages.run_pipeline(file, run_dir=tmp_path / "run")
    assert shell.ran == ["a", "b", "c"] and summary["status"] == "finished"
    assert list(summary["stages"]) == ["a", "b", "c"] and summary["stages"]["b"]["seconds"] == 1.5
    assert f"path: {tmp_path}/run/a/model" in (tmp_path / "run/stages/b.yaml").read_text()


def test_a_failed_stage_is_gone_on_with_and_the_others_are_kept(shell, file, tmp_path):
    shell.failing = {"b": -9}
    with pytest.raises(StageError, match=r"stage 2/3 b failed \(killed by SIGKILL\).*--resume auto"):
        stages.run_pipeline(file, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["stages"]["b"]["status"] == "not finished"
    shell.failing = {}
    assert stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)["status"] == "finished"
    assert shell.ran == ["a", "b", "b resumed", "c"]


def test_a_stage_without_checkpoints_begins_again(shell, file, tmp_path):
    file.write_text(STAGES.replace("run: dpo", "run: eval").replace(
        'model.path: "${a.model}", data.path: pairs.jsonl', 'models: {a: "${a.model}"}, data.path: prompts.jsonl'
    ))  # fmt: skip
    shell.failing = {"b": -9}
    with pytest.raises(StageError):
        stages.run_pipeline(file, run_dir=tmp_path / "run")
    (tmp_path / "run/b/half.jsonl").touch()
    shell.failing = {}
    stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)
    assert shell.ran == ["a", "b", "b", "c"] and not (tmp_path / "run/b/half.jsonl").exists()


@pytest.mark.parametrize("status", [130, -signal.SIGINT, -signal.SIGTERM])
def test_ctrl_c_in_a_stage_ends_the_pipeline_as_interrupted(shell, file, tmp_path, status):
    shell.failing = {"a": status}
    with pytest.raises(KeyboardInterrupt):
        stages.run_pipeline(file, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"


def test_another_setting_of_a_finished_stage_is_refused(shell, file, tmp_path):
    stages.run_pipeline(file, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="stage b has finished with other settings"):
        stages.run_pipeline(file, ["b.learner.lr=1"], tmp_path / "run", resume=True)


def test_a_setting_that_is_newer_than_a_finished_stage_is_no_other_setting(shell, file, tmp_path):
    stages.run_pipeline(file, run_dir=tmp_path / "run")
    written = tmp_path / "run/stages/b.yaml"
    tree = yaml.safe_load(written.read_text())
    del tree["data"]["cleaning"]["privacy"], tree["eval"]
    written.write_text(yaml.safe_dump(tree))
    stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)
    assert shell.ran == ["a", "b", "c"]
    written.write_text(yaml.safe_dump({**tree, "seed": 5}))
    with pytest.raises(ConfigError, match="stage b has finished with other settings"):
        stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)
    written.write_text(yaml.safe_dump({**tree, "no_more": 5}))
    with pytest.raises(ConfigError, match="stage b has finished with other settings"):
        stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)


def test_a_stage_older_than_its_input_is_refused(shell, file, tmp_path):
    stages.run_pipeline(file, run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run/a")
    with pytest.raises(ConfigError, match="stage b has finished before its input 'a' did"):
        stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "run/b")
    stages.run_pipeline(file, run_dir=tmp_path / "run", resume=True)
    assert shell.ran == ["a", "b", "c", "a", "b"]  # c reads from neither: kept


def test_nothing_is_made_for_a_pipeline_that_cannot_run(shell, file, tmp_path):
    with pytest.raises(ConfigError, match="did you mean learner"):
        stages.run_pipeline(file, ["c.lerner.lr=1"], tmp_path / "run")
    assert shell.ran == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", [stages.run_pipeline, lambda path, run_dir: stages.describe_pipeline(path)])
def test_a_secret_for_which_a_file_is_no_place_is_refused(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    settings = "{model.path: m, data.path: p.jsonl, rewards: [{function: 'http://ada:pw7@host?key=k7'}]}"
    (tmp_path / "two.yaml").write_text(f"name: two\nstages:\n  - {{name: a, run: rl, set: {settings}}}\n")
    with pytest.raises(ConfigError, match="stage a: rewards.0.function may hold a secret.*token_env") as error:
        run(tmp_path / "two.yaml", run_dir=tmp_path / "run")
    assert "pw7" not in str(error.value) and "k7" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_package_that_the_last_stage_needs_is_missed_before_the_first(shell, file, tmp_path, monkeypatch):
    file.write_text(STAGES + '  - {name: d, run: eval, set: {models: {c: "${c.model}"}, data.path: prompts.jsonl}}\n')
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"sacrebleu .*pip install 'rlhf-ray\[eval\]'"):
        stages.run_pipeline(file, run_dir=tmp_path / "run")
    assert shell.ran == [] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own(tmp_path, capfd):
    assert stages.run_command(["--help"]) == 0
    assert stages.run_command(["validate-data", str(tmp_path / "none.jsonl")]) == 3
    printed = capfd.readouterr()
    assert "quickstart" in printed.out and "none.jsonl" in printed.err


SLOW_TO_STOP = """
import signal
import time
from pathlib import Path
from rlhf_ray import cli
from rlhf_ray.commands.pipeline import stages

signal.signal(signal.SIGTERM, cli.terminated)

def slow_to_stop(arguments):
    signal.signal(signal.SIGTERM, cli.terminated)
    Path("started").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        Path("checkpoint").touch()

if __name__ == "__main__":
    stages._command = slow_to_stop
    stages.run_command(["rl"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("send", "sign", "ends_with"), [
    (os.killpg, signal.SIGINT, "KeyboardInterrupt"),  # as a terminal does: to both
    (os.kill, signal.SIGTERM, "Terminated"),
])  # fmt: skip
def test_a_stage_has_the_time_to_write_its_checkpoint(tmp_path, send, sign, ends_with):
    (tmp_path / "script.py").write_text(SLOW_TO_STOP)
    run = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "started").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        send(run.pid, sign)
        assert ends_with in run.communicate()[1]
    finally:
        run.kill()
    assert (tmp_path / "checkpoint").exists()


def test_the_dry_run_shows_every_stage(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    text = stages.describe_pipeline(file)
    assert "# stage b: rlhf-ray dpo, reads from a" in text and "path: RUN/a/model" in text
