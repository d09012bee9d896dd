"""The commands sft, rm, dpo and classifier: what they print, and what they refuse."""

from __future__ import annotations

import json
import re
import signal

import pytest
import yaml

from rlhf_ray.commands import restart
from rlhf_ray.config.load import load_config
from rlhf_ray.config.supervised import SCHEMAS


@pytest.fixture
def file(tmp_path):
    """A run of two steps on eight pairs, which every command but the classifier can read."""
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}+1=", "chosen": f"[/{i + 1}]", "rejected": "?", "text": f"{i}+", "label": i % 2}
            for i in range(8)]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "steps": 2,
        "device": "cpu",
        "model": {
            "path": "scratch:qwen2",
            "tokenizer": {"path": "scratch:char"},
            "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16},
        },
        "data": {"path": str(data), "eval_size": 2, "max_length": 16},
        "logging": {"loggers": []},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_dry_run_prints_what_reads_back_and_what_it_needs(rlhf_ray, file, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    settings = ["learner.lr=1e-7", *(["data.type=labelled"] if command == "classifier" else [])]
    status, out, _ = rlhf_ray(command, file, *settings, "--dry-run")
    assert status == 0 and "# placement: executor local, device cpu, float32" in out and "trainer    torch" in out
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    assert load_config(printed, schema=SCHEMAS[command]) == load_config(file, settings, SCHEMAS[command])
    assert not (tmp_path / "runs").exists(), "nothing was run"


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_run_ends_with_a_table_and_samples_where_there_are_any(rlhf_ray, file, tmp_path, command):
    status, out, _ = rlhf_ray(command, file, "--run-dir", tmp_path / "run")
    assert status == 0 and "2 steps in" in out and "val/loss" in out
    assert "pairs.jsonl: 8 rows, 8 examples" in out, "what was read, and what was left out of it"
    assert ("The same held-out prompts" in out) == (command == "sft")
    assert f"the model is in {tmp_path}/run/model\nTalk to it: rlhf-ray generate {tmp_path}/run\n" in out


def test_a_classifier_reads_text_and_label(rlhf_ray, file, tmp_path):
    status, out, _ = rlhf_ray("classifier", file, "data.type=labelled", "--run-dir", tmp_path / "run")
    assert status == 0 and "test/accuracy" not in out and "val/accuracy" in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.batchsize=1", "eval.patienc=1"], "2 problems"),
        (["samples.cnt=1"], "samples.cnt: unknown key; did you mean samples.count?"),
        (["rewards=[]"], "rewards: unknown key"),
        (["data.path=gone.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_bad_input_is_status_2_and_one_paragraph(rlhf_ray, file, tmp_path, overrides, expected):
    status, out, err = rlhf_ray("sft", file, *overrides, "--run-dir", tmp_path / "run")
    assert status == (3 if "gone" in expected else 2) and err.startswith("rlhf-ray: ") and expected in err
    assert "Traceback" not in err + out and not (tmp_path / "run").exists()


def test_ctrl_c_lets_the_step_end(rlhf_ray, file, tmp_path, monkeypatch):
    from rlhf_ray.roles.supervised import SupervisedTrainer

    real = SupervisedTrainer.step

    def step(self, rows, lr):
        if self.engine.steps == 0:
            signal.raise_signal(signal.SIGINT)
        return real(self, rows, lr)

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    status, out, _ = rlhf_ray("sft", file, "--run-dir", tmp_path / "run")
    assert status == 130 and "interrupted after step 1 of 2; the same command with --resume auto goes on" in out


def test_an_interrupted_run_says_how_to_go_on(rlhf_ray, file, tmp_path, monkeypatch):
    from rlhf_ray.roles.supervised import SupervisedTrainer

    real = SupervisedTrainer.step

    def step(self, rows, lr):
        if self.engine.steps == 1:
            raise KeyboardInterrupt
        return real(self, rows, lr)

    monkeypatch.setattr(SupervisedTrainer, "step", step)
    arguments = ("sft", file, "checkpoint.every=1", "--run-dir", tmp_path / "run")
    status, out, err = rlhf_ray(*arguments)
    assert status == 130 and err.endswith("rlhf-ray: interrupted\n")
    assert "interrupted after step 1 of 2; the same command with --resume auto goes on from the checkpoint of" in out
    monkeypatch.setattr(SupervisedTrainer, "step", real)
    status, out, _ = rlhf_ray(*arguments, "--resume", "auto")
    assert status == 0 and f"run directory: {tmp_path}/run, from step 1" in out


HANGS_ONCE = """
import os, signal
from pathlib import Path

def observer(record):
    mark = Path(__file__).with_name("hung")
    if record.step == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.system
def test_a_run_that_hangs_is_started_again_and_ends_as_if_it_had_not(rlhf_ray, file, tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "PAUSE_S", 0.1)
    (tmp_path / "hangs.py").write_text(HANGS_ONCE)
    settings = ["steps=4", "checkpoint.every=1", "ray.pulse_s=0.2", "ray.silence_s=5"]
    assert rlhf_ray("rm", file, *settings, "--run-dir", tmp_path / "calm")[0] == 0
    stopping = f"logging.observers=[{tmp_path}/hangs.py:observer]"
    status, _, err = rlhf_ray("rm", file, *settings, stopping, "--run-dir", tmp_path / "run", "--restart", 2)
    assert status == 0 and re.search(r"rlhf-ray: process \d+ gave no sign of life for 5 s, and is killed\n", err)
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("calm", "run")]
    assert weights[0] == weights[1], "bit for bit"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:3] == ["started", "restarted", "resumed"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_every_command_can_be_watched_over(rlhf_ray, file, tmp_path, monkeypatch, command):
    started = []

    def run_child(arguments, start_s):
        started.append(arguments)
        return restart.Ended(4, "exit status 4")

    monkeypatch.setattr(restart, "run_child", run_child)
    labelled = ["data.type=labelled"] if command == "classifier" else []
    assert rlhf_ray(command, file, *labelled, "--run-dir", tmp_path / "run", "--restart", 1)[0] == 4
    assert started == [
        [command, str(file), *labelled, "--run-dir", str(tmp_path / "run"), "--resume", "never"]
    ]  # fmt: skip
