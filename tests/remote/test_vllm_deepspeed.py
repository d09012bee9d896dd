"""The combination that clusters run: vLLM generates, DeepSpeed ranks learn, all of it on Ray. Here on CPU."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start.rl import run_rl

STEPS = 3


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completions_of(folder: Path) -> list[list[str]]:
    files = [folder / "rollouts" / f"step_{step}.jsonl" for step in range(1, STEPS + 1)]
    return [[json.loads(line)["completion"] for line in file.read_text().splitlines()] for file in files]


def environments_of_workers(monkeypatch, variable: str) -> dict[str, str | None]:
    """Filled at the first logged step: the title of each Ray worker's process -> the variable it was started with."""
    found: dict[str, str | None] = {}
    log = TrainingRun.log

    def look_and_log(*args, **kwargs):
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_text().split("\0")[0]
                started_with = (process / "environ").read_text().split("\0")
                if title.startswith("ray::") and "Host" in title:
                    values = dict(line.partition("=")[::2] for line in started_with)
                    found[f"{title} {process.name}"] = values.get(variable)
        return log(*args, **kwargs)

    monkeypatch.setattr(TrainingRun, "log", look_and_log)
    return found


def require_lines_of_the_start(output: str) -> None:
    """While everything starts: what begins, who is ready, who is waited for."""
    began = output.index("starting Ray on this machine\n")
    lines = output[began:].splitlines()
    assert re.fullmatch(r"Ray is ready in \d+ s: 1 machine, .*", lines[1])
    assert lines[2:4] == [
        "starting 6 workers",
        "loading learner rank 0-1 (deepspeed), generator 0-1 (vllm), reference, reward",
    ]
    ready = [re.fullmatch(r"(.+) ready in \d+ s(?:; waiting for (.*))?", line) for line in lines[4:8]]
    assert {line[1] for line in ready} == {
        "learner rank 0-1 (deepspeed)", "generator 0-1 (vllm)", "reference", "reward"
    }  # fmt: skip
    assert [line[2] is None for line in ready] == [False, False, False, True], "at last nobody is waited for"


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_vllm_and_two_zero_ranks(tiny_config, tmp_path, monkeypatch, capsys, strikes):
    """The run starts its own Ray, learns something, and the generator follows each update to 1e-4. Both are killed
    while they write, so that it waits for the first that takes a place, and is sent the weights of both ranks."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "compiled" / name))
    settings = (
        f"steps={STEPS}", "generator.engine=vllm", "algorithm.kl_coef=0.01", "logging.rollouts=24", "eval.size=2",
        # vLLM's CPU attention has no kernel for heads narrower than 32.
        "model.scratch.hidden_size=64", "model.scratch.heads=2",
    )  # fmt: skip
    config = tiny_config(
        *settings, "executor=ray", "generator.count=2", "learner.engine=deepspeed", "learner.world_size=2",
        "learner.zero_stage=2", "ray.start_deadline_s=400",
    )  # fmt: skip
    waiting = environments_of_workers(monkeypatch, "GOMP_SPINCOUNT")
    # At most 2 calls evaluate, and 4 are the first step's; at least 2 are any other's: the weights are no longer those
    # that it loads.
    struck = strikes({(name, "write"): (7, name) for name in ("generator 0", "generator 1")})
    summary = run_rl(config, tmp_path / "run")
    require_lines_of_the_start(capsys.readouterr().out)
    assert len(waiting) >= 5, "two generators, two ranks, the reference, the reward"
    assert set(waiting.values()) == {"1000"}, f"a busy neighbour would cost more than its share: {waiting}"
    steps = metrics_of(tmp_path / "run")
    assert summary["status"] == "finished" and len(steps) == STEPS
    assert len(struck) == 2 and 1 <= sum(step["fault/restarts"] for step in steps) <= 2
    for step in steps:
        assert step["sync/canary_absdiff"] < 1e-4
        assert step["mismatch/absdiff_max"] < 1e-4, "what it says it sampled with is what the learner computes"
        assert step["grad_norm"] > 0 and step["approx_kl"] == 0 and step["ratio/max"] == 1
        assert step["staleness/max"] == 0
    assert abs(steps[-1]["kl_ref"]) > 0, "the policy has moved from the reference"
    # A laptop may have no compiler, and it would take the first step a minute.
    assert not [path for path in (tmp_path / "compiled").rglob("*") if path.is_file()]

    # One generator, one process, another training engine: the same tokens, and the same losses.
    run_rl(tiny_config(*settings), tmp_path / "alone")
    assert completions_of(tmp_path / "alone") == completions_of(tmp_path / "run")
    for one, two in zip(metrics_of(tmp_path / "alone"), steps, strict=True):
        for name in ("loss/policy", "loss/kl", "grad_norm", "entropy", "reward/mean", "kl_ref"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), (name, one["step"])

    # Both go on in one process with one generator: where there were two of each, nothing is missing.
    more = ("generator.engine=hf", f"steps={STEPS + 1}")
    for name in ("alone", "run"):
        run_rl(tiny_config(*settings, *more), tmp_path / name, resume=True)
    last = [metrics_of(tmp_path / name)[-1] for name in ("alone", "run")]
    assert last[0]["step"] == STEPS + 1
    for name in ("loss/policy", "loss/kl", "grad_norm", "entropy", "reward/mean", "kl_ref"):
        assert last[1][name] == pytest.approx(last[0][name], abs=1e-4), name
    events = {name: (tmp_path / name / "events.jsonl").read_text().splitlines() for name in ("alone", "run")}
    said = {name: [line for line in lines if '"layout_changed"' in line] for name, lines in events.items()}
    assert said["alone"] == [] and len(said["run"]) == 1
    assert "learner.engine deepspeed -> torch, learner.world_size 2 -> 1; weights" in said["run"][0]
