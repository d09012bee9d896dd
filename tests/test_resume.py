"""What --resume auto must not spoil: results, a run that another process is writing, and the order of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_ray.config.load import load_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.data.fingerprint import CHAT_TEMPLATE
from rlhf_ray.errors import ConfigError, DataError, RewardError
from rlhf_ray.run.directory import RunDirectory, require_alone
from rlhf_ray.start.rl import run_rl

OWN_ENGINE = "rlhf_ray.models.torch_engine:TorchEngine"
MakeConfig = Callable[..., RunConfig]
HOLDER = """
import sys, time
from pathlib import Path
from rlhf_ray.run.directory import require_alone
require_alone(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def config(tmp_path: Path, tiny_tree: dict[str, Any]) -> MakeConfig:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return lambda *overrides: load_config(path, overrides)


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_that_another_process_writes_is_left_alone(config, tmp_path):
    run = tmp_path / "run"
    run_rl(config(), run)
    metrics = (run / "metrics.jsonl").read_text()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"another process \(pid {other.pid} on .*\) is writing this run"):
            run_rl(config("steps=2"), run, resume=True)
        assert (run / "metrics.jsonl").read_text() == metrics and summary_of(run)["status"] == "finished"
    finally:
        other.kill()
        other.wait()
    assert run_rl(config("steps=2"), run, resume=True)["steps"] == 2, "a killed process holds nothing"


def test_a_folder_with_a_lock_and_nothing_else_is_empty(tmp_path):
    """Killed between the lock and the first file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert not RunDirectory(tmp_path / "run", resume=True).resumed
    assert not RunDirectory(tmp_path / "run").resumed


def test_one_process_may_open_its_run_again(tmp_path):
    RunDirectory(tmp_path / "run").write_config("name: x\n")
    require_alone(tmp_path / "run")
    RunDirectory(tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [f"learner.engine={OWN_ENGINE}", "algorithm.name=ppo", "dtype=bfloat16"])
def test_a_checkpoint_that_these_settings_cannot_read_is_refused_before_anything_changes(config, tmp_path, changed):
    run = tmp_path / "run"
    run_rl(config("algorithm.kl_coef=0.05", "dtype=float32"), run)
    before = {name: (run / name).read_text() for name in ("summary.json", "config.yaml", "metrics.jsonl")}
    with pytest.raises(ConfigError, match=r"from a checkpoint that other settings cannot read, and \S+ has changed"):
        run_rl(config("algorithm.kl_coef=0.05", "dtype=float32", "steps=2", changed), run, resume=True)
    assert {name: (run / name).read_text() for name in before} == before


@pytest.mark.slow
def test_a_finished_run_keeps_its_results_until_it_goes_on(config, tmp_path):
    """What fails before the first new step takes nothing away; what is done after that does."""
    run = tmp_path / "run"
    finished = run_rl(config(), run)
    (tmp_path / "bad.py").write_text("def bad(completions):\n    raise ValueError('no')\n")
    with pytest.raises(RewardError, match="no"):
        run_rl(config("steps=2", f"rewards.0.function={tmp_path}/bad.py:bad"), run, resume=True)
    assert summary_of(run) == finished
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "resume_failed" and "no" in events[-1]["error"]
    assert run_rl(config("steps=2"), run, resume=True)["steps"] == 2


@pytest.mark.slow
def test_a_data_file_that_has_changed_is_noticed(config, tmp_path):
    rows = [json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("abc", "abd", "abe", "abf", "abg", "abh")]
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(rows))
    run_rl(config(f"data.path={data}", "data.field=prompt"), run)
    before = {path.name: path.read_text() for path in run.glob("*.*") if path.is_file()}
    for rows_now, said in ((rows[1:], "6 rows then, 5 now"), (rows[::-1], "6 rows as before, with other content or")):
        data.write_text("".join(rows_now))
        with pytest.raises(DataError, match=rf"the data has changed since the run began: {data} .{said}"):
            run_rl(config(f"data.path={data}", "data.field=prompt", "steps=2"), run, resume=True)
    assert {path.name: path.read_text() for path in run.glob("*.*") if path.is_file()} == before
    data.write_text("".join(rows))
    assert run_rl(config(f"data.path={data}", "data.field=prompt", "steps=2"), run, resume=True)["steps"] == 2


@pytest.mark.slow
def test_answers_that_have_changed_are_noticed_too(config, tmp_path):
    """No prompt shows them, and the reward reads them; nor does the run learn from what it is tested on."""
    data, held_out, run = tmp_path / "data.jsonl", tmp_path / "held.jsonl", tmp_path / "run"
    rows = [{"prompt": f"say {word}", "answer": word} for word in ("abc", "abd")]
    for path in (data, held_out):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"data.path={data}", "data.field=prompt", f"data.eval_path={held_out}")
    run_rl(config(*settings), run)
    for path in (data, held_out):
        whole = path.read_text()
        path.write_text(whole.replace('"answer": "abd"', '"answer": "abe"'))
        with pytest.raises(DataError, match=rf"the data has changed since the run began: {path}"):
            run_rl(config(*settings, "steps=2"), run, resume=True)
        path.write_text(whole)
    # Others are asked from now on: allowed, and told.
    assert run_rl(config(*settings, "steps=2", "eval.size=1"), run, resume=True)["steps"] == 2
    events = RunDirectory(run, resume=True).read_events()
    (said,) = [event["reason"] for event in events if event["event"] == "data_changed"]
    assert said.endswith(f"{held_out}, held out, the first 1")


@pytest.mark.slow
def test_a_chat_template_that_has_changed_is_noticed(config, tmp_path):
    """The same rows, the same path of the template, and other prompts."""
    data, template, run = tmp_path / "data.jsonl", tmp_path / "chat.jinja", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("abc", "abd", "abe", "abf")))
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    settings = (f"data.path={data}", "data.template=chat", f"data.chat_template={template}",
                "model.tokenizer.alphabet='abcdefsy .0123456789'", "data.max_prompt_tokens=24")  # fmt: skip
    run_rl(config(*settings), run)
    whole = template.read_text()
    template.write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    with pytest.raises(DataError, match="has changed since the run began: the chat template, so the same rows would"):
        run_rl(config(*settings, "steps=2"), run, resume=True)
    template.write_text(whole)
    (run / "data.json").write_text(json.dumps({  # as a version left it that kept none of the template
        name: value for name, value in json.loads((run / "data.json").read_text()).items() if name != CHAT_TEMPLATE
    }))  # fmt: skip
    assert run_rl(config(*settings, "steps=2"), run, resume=True)["steps"] == 2
    assert not [event for event in RunDirectory(run, resume=True).read_events() if event["event"] == "data_changed"]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_date_in_its_prompts(config, tmp_path, monkeypatch):
    """A chat template that prints today's date, and a run that goes on the next day."""
    data, template, run = tmp_path / "data.jsonl", tmp_path / "dated.jinja", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("abc", "abd", "abe", "abf")))
    template.write_text("{{ strftime_now('%d.%m') }} {% for m in messages %}{{ m.content }}{% endfor %}")
    settings = (f"data.path={data}", "data.template=chat", f"data.chat_template={template}", "steps=2",
                "model.tokenizer.alphabet='abcdefsy .0123456789'", "data.max_prompt_tokens=24")  # fmt: skip
    whole = run_rl(config(*settings, "clock=2031-05-06T23:59:00"), tmp_path / "whole")

    def today(day: int) -> None:
        now = datetime(2031, 5, day, 12)
        clock = SimpleNamespace(now=lambda: now, fromisoformat=datetime.fromisoformat)
        monkeypatch.setattr("rlhf_ray.run.resume.datetime", clock)

    today(6)
    run_rl(config(*settings, "steps=1"), run)
    today(7)
    parts = run_rl(config(*settings), run, resume=True)
    shown = [json.loads(line)["prompt"] for line in (run / "rollouts" / "step_2.jsonl").read_text().splitlines()]
    assert len(shown) == 4 and all(prompt.startswith("06.05 say ") for prompt in shown)
    assert parts["before"] == whole["before"] and parts["after"] == whole["after"], "the same prompts, the same numbers"
