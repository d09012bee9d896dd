"""Runs whose checkpoints are written behind the next step compute the same, and leave the same."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.errors import StorageError
from rlhf_ray.models import torch_engine
from rlhf_ray.start.rl import run_rl
from rlhf_ray.start.supervised import run_supervised


def hashes(run, part):
    """Of all that a network has left, by checkpoint."""
    found = run.glob("checkpoints/step_*/manifest.json")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in found}
    return {
        step: {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith(part)}
        for step, manifest in manifests.items()
    }


@pytest.mark.slow
def test_reinforcement_learning(tiny_config, tmp_path):
    settings = ("steps=4", "checkpoint.every=1", "checkpoint.keep=9", "algorithm.name=ppo")
    for name in ("false", "true"):
        run_rl(tiny_config(*settings, f"checkpoint.background={name}"), tmp_path / name)
    for part in ("learner", "critic"):
        found = hashes(tmp_path / "true", part)
        assert len(found) == 4 and all(found.values())
        assert found == hashes(tmp_path / "false", part)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("false", "true")]
    assert models[0] == models[1]
    assert not list((tmp_path / "true" / "checkpoints").glob("*.tmp-*"))


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_ends_the_run_at_the_next_step(tiny_config, tmp_path, monkeypatch):
    settings = ("steps=9", "checkpoint.every=2", "checkpoint.background=true")
    write, calls = torch_engine.write_state, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(torch_engine, "write_state", full)
    with pytest.raises(StorageError, match="step_4 .*the disk is full"):
        run_rl(tiny_config(*settings), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) in [("failed", 4), ("failed", 5)]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_2"]
    monkeypatch.setattr(torch_engine, "write_state", write)
    assert run_rl(tiny_config(*settings), tmp_path, resume=True)["steps"] == 9


@pytest.mark.slow
def test_supervised_runs_go_back_to_a_best_checkpoint_that_is_still_being_written(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} is {n * n}"}) + "\n" for n in range(12)))
    tree = {
        "device": "cpu", "steps": 6,
        "model": {"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"},
                  "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 24}},
        "data": {"path": str(data), "eval_size": 3, "max_length": 24}, "learner": {"batch_size": 4, "lr": 1.0},
        "eval": {"every": 1, "patience": 1}, "logging": {"loggers": []}, "samples": {"count": 0},
    }  # fmt: skip
    for name in (False, True):
        config = parse_config({**tree, "checkpoint": {"every": 0, "background": name}}, SCHEMAS["sft"], source="test")
        run_supervised(config, tmp_path / str(name))
    ends = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("False", "True")]
    assert ends[0]["stopped_early"] and ends[0]["kept_step"] == ends[1]["kept_step"] < ends[0]["steps"]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("False", "True")]
    assert models[0] == models[1] and hashes(tmp_path / "True", "trainer") == hashes(tmp_path / "False", "trainer")
