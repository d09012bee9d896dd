"""Supervised runs on a real Ray: two sharded ranks give the numbers of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_ray.config.load import apply_override, parse_config
from rlhf_ray.config.supervised import SCHEMAS, SupervisedConfig
from rlhf_ray.remote.supervised import plan_ranks
from rlhf_ray.start.supervised import run_supervised

# Ragged, so that the two ranks get different numbers of micro-batches.
ROWS = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}" + "9" * (a * b % 5), "rejected": "0"} for a in range(1, 6)
        for b in range(4)]  # fmt: skip


def config(folder: Path, command: str, *overrides: str) -> SupervisedConfig:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree: dict[str, Any] = {
        "device": "cpu",
        "steps": 4,
        "model": {
            "path": "scratch:qwen2",
            "tokenizer": {"path": "scratch:char"},
            "scratch": {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 24},
        },
        "data": {"path": str(data), "eval_size": 5, "max_length": 24},
        "learner": {"batch_size": 6, "lr": 1e-3, "tokens_per_microbatch": 24},
        "eval": {"every": 2},
        "checkpoint": {"every": 2},
        "ray": {"start_deadline_s": 200},
        "logging": {"loggers": []},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, SCHEMAS[command], source="the test")


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize(("command", "stage", "more"), [
    ("sft", 3, []), ("dpo", 2, []), ("dpo", 3, ["dpo.kind=kto", "dpo.undesirable_weight=2"]),
], ids=["sft", "dpo", "kto"])  # fmt: skip
def test_two_ranks_give_the_numbers_of_one_process(tmp_path, strikes, command, stage, more):
    """Losses, validation, samples and weights, over two sources; the second half of the SFT runs is a resumed one, of
    which one process has computed the first, and in that of the DPO run a rank is killed."""
    second = tmp_path / "more.jsonl"
    second.write_text("".join(json.dumps({**row, "prompt": row["prompt"] + "+"}) + "\n" for row in ROWS[:9]))
    first = tmp_path / "pairs.jsonl"
    sources = [f"data.sources=[{{path: {first}, weight: 2}}, {{path: {second}, weight: 1}}]", "data.path=null", *more]
    ray = ["executor=ray", "learner.engine=deepspeed", "learner.world_size=2", f"learner.zero_stage={stage}"]
    ray += ["checkpoint.every=1", "checkpoint.background=true"] if command == "sft" else []
    adapts = command == "dpo" and not more
    lora = ["model.lora.r=2", "learner.lr=0.01"] if adapts else []
    struck = strikes({("trainer rank 0", "step"): (4, "trainer rank 1")} if adapts else {})
    for name, overrides in (("local", lora), ("ray", [*lora, *ray])):
        if command == "sft":
            run_supervised(config(tmp_path, command, *sources, *lora, "steps=2"), tmp_path / name)
        run_supervised(config(tmp_path, command, *sources, *overrides), tmp_path / name, resume=command == "sft")
    one, other = tmp_path / "local", tmp_path / "ray"
    events = [json.loads(line) for line in (other / "events.jsonl").read_text().splitlines()]
    back = [(event["step"], event["steps_again"]) for event in events if event["event"] == "rewound"]
    assert (struck, back) == ((["trainer rank 0 step"], [(2, 1)]) if adapts else ([], []))
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows, strict=True):
        names = [name for name in a if not name.startswith(("time/", "perf/", "cost/"))]
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, abs=1e-5), a["step"]
        assert a["grad_norm"] > 0 and (a["source/pairs/count"], a["source/more/count"]) == (4, 2)
    ends = [json.loads((run / "summary.json").read_text())["after"] for run in (one, other)]
    assert ends[0].get("samples") == ends[1].get("samples")
    if command == "sft":
        manifest = json.loads((other / "checkpoints" / "step_4" / "manifest.json").read_text())
        wrote = {"engine": "deepspeed", "world_size": 2, "zero_stage": 3, "dtype": "torch.float32"}
        assert manifest["parts"] == {"trainer": wrote}
        assert (other / "checkpoints" / "step_3" / "manifest.json").is_file()
    weights = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (one, other)]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-5, rtol=0)
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (one, other)]
    assert [adapter.is_file() for adapter in adapters] == [adapts] * 2
    if adapts:
        learned = [load_file(adapter) for adapter in adapters]
        assert learned[0].keys() == learned[1].keys()
        for name in learned[0]:
            torch.testing.assert_close(learned[1][name], learned[0][name], atol=1e-5, rtol=0)


def test_every_rank_has_a_gpu_of_its_own(tmp_path):
    settings = config(tmp_path, "rm", "executor=ray", "learner.engine=deepspeed", "learner.world_size=3")
    plan = plan_ranks(settings, "cuda")
    assert [seat.name for seat in plan.seats] == [f"trainer rank {i}" for i in range(3)]
    assert plan.bundles == [{"CPU": 0.5, "GPU": 1.0}] * 3 and plan_ranks(settings, "cpu").total("GPU") == 0
