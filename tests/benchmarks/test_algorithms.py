"""The comparison of algorithms: its command lines are valid, finished runs are kept, and its table is right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import algorithms
from benchmarks.algorithms import ALGORITHMS, TASKS, Result, Run
from rlhf_ray.config.algorithm import PRESETS
from rlhf_ray.config.load import load_config


@pytest.mark.parametrize("task", TASKS)
def test_every_run_is_a_valid_config(repo_root, tmp_path, task):
    configs = {}
    for name in ALGORITHMS:
        settings = algorithms.settings_of(Run(task, name, 1), tmp_path, Path("reviews.jsonl"))
        configs[name] = load_config(repo_root / TASKS[task].config, settings)
    assert {config.algorithm.name for config in configs.values()} == set(PRESETS), "all of them"
    assert all(config.seed == 1 and config.uses_reference for config in configs.values())
    sampled = {c.rollout.prompts_per_step * (c.rollout.group_size + (n == "remax")) for n, c in configs.items()}
    assert len(sampled) == 1 and len({c.steps for c in configs.values()}) == 1, "one budget"


def fake_command(monkeypatch, body: str) -> None:
    monkeypatch.setattr(algorithms.sys, "executable", "/bin/sh")
    spawn = os.posix_spawn
    monkeypatch.setattr(
        algorithms.os, "posix_spawn", lambda path, argv, env, **kw: spawn(path, ["sh", "-c", body, *argv], env, **kw)
    )


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    count = tmp_path / "count"
    fake_command(monkeypatch, f'echo x >> {count}; for f; do :; done; mkdir -p "$f"')
    folder = tmp_path / "runs" / "one"
    first = algorithms.execute("c.yaml", ["a=1"], folder)
    assert first["cpu_seconds"] >= 0 and first["peak_mb"] > 0
    assert algorithms.execute("c.yaml", ["a=1"], folder) == first and count.read_text() == "x\n"
    algorithms.execute("c.yaml", ["a=2"], folder)
    assert count.read_text() == "x\nx\n", "other settings are another run"


def test_a_run_that_fails_ends_the_benchmark(tmp_path, monkeypatch):
    fake_command(monkeypatch, "exit 3")
    with pytest.raises(SystemExit, match=r"failed; see .*one\.log"):
        algorithms.execute("c.yaml", [], tmp_path / "runs" / "one")
    assert not (tmp_path / "runs" / "one" / "usage.json").exists()


def result(algorithm: str, seed: int, reward: float) -> Result:
    return Result(
        "sums", algorithm, seed, rewards=[9.0, *[reward] * 5], before={"accuracy": 0.25 * seed},
        after={"accuracy": 1.0}, kl=1.0, samples=16, cpu_seconds=10.0, peak_mb=300.0, commit=f"c{seed}",
    )  # fmt: skip


def test_the_report(tmp_path):
    (tmp_path / "algorithms_results.md").write_text(f"# Mine\n\n{algorithms.MARKER}\nold\n")
    results = [result("grpo", 0, 0.5), result("grpo", 1, 0.7), result("ppo", 0, 0.1), result("ppo", 1, 0.1)]
    algorithms.write_report(results, tmp_path)
    page = (tmp_path / "algorithms_results.md").read_text()
    assert page.startswith("# Mine") and "old" not in page and "Seeds: 0, 1. Code: commit c0, c1." in page
    # standard deviation of 0.5 and 0.7 with n-1: 0.1414
    assert "| grpo | 0.600 ± 0.141 | 1.000 ± 0.000 | 1.00 ± 0.00 | 16 ± 0 | 10 ± 0 | 300 ± 0 |" in page
    assert "| *start* | | 0.125 ± 0.177 | 0 |" in page
    assert len(json.loads((tmp_path / "algorithms_results.json").read_text())) == 4
    assert (tmp_path / "images" / "algorithms_sums.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing():
    assert algorithms.smoothed([1.0, 2.0, 6.0, 4.0], width=2) == [1.0, 1.5, 4.0, 5.0]
