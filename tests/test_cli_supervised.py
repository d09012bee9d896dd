"""The commands sft, rm, dpo and classifier: what they print, and what they refuse."""

from __future__ import annotations

import json
import signal

import pytest
import yaml

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
