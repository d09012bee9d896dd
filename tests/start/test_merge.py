"""A model folder out of a checkpoint is the one that the run itself exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models import weight_files
from rlhf_ray.start.merge import merge
from rlhf_ray.start.rl import run_rl
from rlhf_ray.start.supervised import run_supervised


def require_same(made: Path, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {path.name for path in made.iterdir()} == names
    for name in names - {"model.safetensors", "adapter_model.safetensors"}:
        assert (made / name).read_bytes() == (exported / name).read_bytes(), name
    for name in names & {"model.safetensors", "adapter_model.safetensors"}:
        one, other = load_file(made / name), load_file(exported / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert {tensor.dtype for tensor in one.values()} == {tensor.dtype for tensor in other.values()}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ("dtype=bfloat16", "model.scratch.tie_embeddings=false"), ("model.lora.r=2", "learner.lr=0.02"),
    ("model.path=scratch:lstm",),
], ids=["bfloat16", "lora", "lstm"])  # fmt: skip
def test_of_a_run_of_reinforcement_learning(tiny_config, tmp_path, settings):
    run = tmp_path / "run"
    run_rl(tiny_config("steps=2", "checkpoint.every=1", *settings), run)
    said = []
    made = merge(run, note=said.append)
    assert made == run / "merged" / "step_2" and said[0].endswith("tensors of 1 rank of torch")
    require_same(made, run / "model")
    if "lora" in settings[0]:
        require_same(merge(run, what="adapter", out=tmp_path / "adapter"), run / "adapter")
        assert not (tmp_path / "adapter.unfinished").exists()
    else:
        with pytest.raises(ConfigError, match="trained without model.lora, so there is no adapter"):
            merge(run, what="adapter")
    before = merge(run, 1, tmp_path / "before")
    assert not all(torch.equal(one, other) for one, other in zip(
        load_file(before / "model.safetensors").values(), load_file(made / "model.safetensors").values(), strict=True
    ))  # fmt: skip


def supervised(command: str, folder: Path, **more) -> Path:
    data = folder / "pairs.jsonl"
    rows = [{"prompt": f"{a}+1=", "chosen": f"{a + 1}", "rejected": "x"} for a in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "device": "cpu", "steps": 1,
        "model": {"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"}, **more.pop("model", {}),
                  "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 24}},
        "data": {"path": str(data), "max_length": 24}, "learner": {"batch_size": 4, "lr": 1e-2},
        "logging": {"loggers": []}, **more,
    }  # fmt: skip
    run_supervised(parse_config(tree, SCHEMAS[command], source="the test"), folder / "run")
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"lora": {"r": 2}}], ids=["whole", "lora"])
def test_of_a_reward_model(tmp_path, model):
    run = supervised("rm", tmp_path, model=model)
    require_same(merge(run), run / "model")


@pytest.mark.slow
def test_it_needs_nothing_but_the_checkpoint_and_leaves_nothing_half_done(tiny_config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_rl(tiny_config("steps=2", "checkpoint.every=1"), run)
    shutil.rmtree(run / "rollouts")
    (run / "config.yaml").write_text("garbage: [")
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 4000)
    written = []
    save_file = weight_files.save_file

    def full_disk(*args):
        written.append(args)
        if len(written) == 3:
            raise KeyboardInterrupt
        save_file(*args)

    monkeypatch.setattr(weight_files, "save_file", full_disk)
    with pytest.raises(KeyboardInterrupt):
        merge(run, out=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(weight_files, "save_file", save_file)
    made = merge(run, out=tmp_path / "made")
    places = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    exported = load_file(run / "model" / "model.safetensors")
    assert places.keys() == exported.keys() and len(set(places.values())) > 3
    assert all(torch.equal(load_file(made / places[name])[name], tensor) for name, tensor in exported.items())
    assert {path.name for path in made.glob("*.safetensors")} == set(places.values())
    with pytest.raises(ConfigError, match="made: is there already; name another folder with --out"):
        merge(run, out=tmp_path / "made")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; it has: 1, 2"):
        merge(run, 7)
    with pytest.raises(CheckpointError, match="has no checkpoint; name the directory of a run"):
        merge(tmp_path)
