"""`rlhf-ray dpo` with dpo.kind=kto, small: from rows with a label, or pairs, to a policy that prefers what is good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config.load import apply_override, parse_config
from rlhf_ray.config.supervised import DPOConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.start.supervised import run_supervised

pytestmark = pytest.mark.slow

# What is good is good for any prompt, so answers to other prompts show how far the policy has gone. Three times as many
# are good as are bad.
GOOD = [{"prompt": f"{a}+{b}=", "completion": "7" * (1 + a % 2), "label": True} for a in range(9) for b in range(4)]
BAD = [{"prompt": f"{a}+{b}=", "completion": "0" * (1 + a % 3), "label": False} for a in range(4) for b in range(3)]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "0"} for a in range(1, 5) for b in range(3)]


@pytest.fixture
def config(tmp_path):
    def make(*overrides: str, rows: list[dict[str, Any]] = GOOD + BAD) -> DPOConfig:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree: dict[str, Any] = {
            "device": "cpu",
            "epochs": 4,
            "model": {
                "path": "scratch:qwen2",
                "tokenizer": {"path": "scratch:char"},
                "scratch": {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 16},
            },
            "data": {"path": str(data), "eval_size": 8, "max_length": 16},
            "dpo": {"kind": "kto", "undesirable_weight": 3.0, "beta": 0.5},
            "learner": {"batch_size": 8, "lr": 5e-3},
            "logging": {"loggers": []},
        }
        for override in overrides:
            apply_override(tree, override)
        return parse_config(tree, DPOConfig, source="the test")

    return make


def metrics_of(folder: Path) -> list[dict[str, float]]:
    clocks = ("time/", "perf/", "cost/")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows]


def test_it_learns_from_answers_with_a_label(config, tmp_path):
    summary = run_supervised(config(), tmp_path / "run")
    before, after = summary["before"], summary["after"]
    # At the start the policy is its reference: 1/2 for a good answer, 3/2 for a bad one, and no KL.
    for split in ("train", "val"):
        assert before[f"{split}/rewards/margins"] == before[f"{split}/kl"] == 0
    assert 0.5 < before["train/loss"] < 1.5
    for split in ("train", "val"):
        assert after[f"{split}/rewards/margins"] > 1 and after[f"{split}/loss"] < 0.8 * before[f"{split}/loss"]
    assert after["val/kl"] > 0.1


def test_it_learns_from_pairs(config, tmp_path, capfd):
    summary = run_supervised(config("dpo.undesirable_weight=1", rows=PAIRS), tmp_path / "run")
    assert summary["after"]["train/rewards/margins"] > 0.5 > summary["before"]["train/rewards/margins"] == 0
    assert "answers: 8 good, 8 bad" in capfd.readouterr().out, "four pairs are held out whole"


def test_a_stopped_run_goes_on_bit_for_bit_and_may_become_longer(config, tmp_path):
    settings = ("epochs=1", "learner.lr_schedule=constant", "checkpoint.every=2", "data.eval_size=0")
    run_supervised(config(*settings, "steps=6"), tmp_path / "whole")
    run_supervised(config(*settings, "steps=6"), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_6")
    run_supervised(config(*settings, "steps=6"), tmp_path / "parts", resume=True)
    # Another batch than those that the first part knew of: its mismatched answers are asked of the reference anew.
    run_supervised(config(*settings, "steps=4"), tmp_path / "longer")
    run_supervised(config(*settings, "steps=6"), tmp_path / "longer", resume=True)
    for name in ("parts", "longer"):
        assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / name)
        one, other = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", name))
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)


def test_a_resumed_run_reads_the_rows_as_it_did(config, tmp_path):
    """Pairs are rows of `sigmoid` too; but each is one there."""
    run_supervised(config("steps=1", "dpo.undesirable_weight=1", rows=PAIRS), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dpo\.kind has changed since"):
        run_supervised(config("steps=2", "dpo.kind=sigmoid", "dpo.undesirable_weight=1", rows=PAIRS),
                       tmp_path / "run", resume=True)  # fmt: skip


def test_a_run_that_was_killed_before_it_kept_its_settings_can_be_resumed(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").write_text("")
    assert run_supervised(config("steps=1"), tmp_path / "run", resume=True)["steps"] == 1


def test_the_reference_of_other_rows_is_not_used(config, tmp_path):
    """Also where a run was killed before it had made anything else of them."""
    run_supervised(config("steps=1"), tmp_path / "run")
    for name in ("checkpoints", "start"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "before.json").unlink()
    with pytest.raises(DataError, match="the data has changed since the run began"):
        run_supervised(config("steps=1", rows=BAD + GOOD), tmp_path / "run", resume=True)
