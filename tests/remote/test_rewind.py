"""Whole runs that lose ranks of the learner or the critic: others take their seats, and no bit of the result changes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.start.rl import run_rl
from tests.remote.test_faults import require_no_actors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200), pytest.mark.usefixtures("own_ray")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Those of a step that tell of no time, and of no loss."""
    others = ("time/", "perf/", "cost/", "fault/", "sync/gb_per_s", "ledger/sampled", "ledger/lost")
    return {name: value for name, value in row.items() if not name.startswith(others)}


def require_same_run(folder: Path) -> list[dict[str, Any]]:
    """`run` has ended as `calm`, and its books are closed in each step. Returns its events."""
    rows = [lines(folder / run / "metrics.jsonl") for run in ("calm", "run")]
    assert list(map(numbers, rows[0])) == list(map(numbers, rows[1]))
    weights = [(folder / run / "model" / "model.safetensors").read_bytes() for run in ("calm", "run")]
    assert weights[0] == weights[1], "bit for bit"
    terms = ("learned", "stale", "filtered", "failed", "baseline", "lost", "open")
    for row in rows[1]:
        for unit in ("", "_tokens"):
            assert row[f"ledger/sampled{unit}"] == sum(row[f"ledger/{term}{unit}"] for term in terms)
    require_no_actors()
    return lines(folder / "run" / "events.jsonl")


STRIKES = {
    ("critic rank 0", "learn"): (2, "critic rank 0"),
    ("reward", "score"): (6, "learner rank 0 & generator 0"),
    ("learner rank 0", "learn"): (5, "learner rank 0"),
    ("learner rank 0", "save"): (3, "learner rank 0"),
}
STOPPED = {("learner rank 0", "learn")}


def test_lost_ranks_change_no_bit_of_the_result(tiny_config, tmp_path, strikes, capsys):
    """Killed while the critic learns, before there is a checkpoint; together with the generator, while others judge;
    stopped while the learner learns; killed while it writes a checkpoint."""
    options = ("algorithm.name=ppo", "steps=5", "eval.size=2", "checkpoint.every=2")
    run_rl(tiny_config(*options), tmp_path / "calm")
    struck = strikes(STRIKES, STOPPED)
    limits = ("ray.restarts=9", "ray.pulse_s=1", "ray.silence_s=15")
    run_rl(tiny_config("executor=ray", *options, *limits), tmp_path / "run")
    assert sorted(struck) == sorted(map(" ".join, STRIKES))
    events = require_same_run(tmp_path)
    said = capsys.readouterr().out
    lost = Counter(event["worker"] for event in events if event["event"] == "worker_lost")
    assert lost == {"critic rank 0": 1, "learner rank 0": 3, "generator 0": 1}
    back = [(event["step"], event["steps_again"]) for event in events if event["event"] == "rewound"]
    assert back == [(0, 1), (2, 0), (2, 1), (4, 1)] and "back to the beginning, for there is no checkpoint" in said
    caught_up = [event for event in events if event["event"] == "caught_up"]
    assert len(caught_up) == 4 and all(event["start_s"] > 0 for event in caught_up)
