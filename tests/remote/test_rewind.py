"""Whole runs that lose ranks of the learner or the critic: others take their seats, and no bit of the result changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.start.rl import run_rl
from tests.remote.test_faults import SHARDED, require_no_actors

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
    ("learner rank 1", "learn"): (2, "learner rank 1"),
    ("learner rank 0", "save"): (2, "learner rank 0"),
    ("reward", "score"): (5, "learner rank 1"),
}


def test_lost_ranks_of_a_learner_change_no_bit_of_the_result(tiny_config, tmp_path, strikes, capsys):
    """Killed while they learn, before there is a checkpoint; while others judge; and while they write one."""
    options = ("algorithm.kl_coef=0.01", "steps=6", "eval.size=2", "checkpoint.every=2", "executor=ray", *SHARDED)
    run_rl(tiny_config(*options), tmp_path / "calm")
    struck = strikes(STRIKES)
    run_rl(tiny_config(*options), tmp_path / "run")
    assert sorted(struck) == sorted(map(" ".join, STRIKES))
    events = require_same_run(tmp_path)
    said = capsys.readouterr().out
    lost = [event["worker"] for event in events if event["event"] == "worker_lost"]
    assert lost == ["learner rank 1", "learner rank 1", "learner rank 0"]
    back = [(event["step"], event["steps_again"]) for event in events if event["event"] == "rewound"]
    assert back == [(0, 1), (2, 0), (2, 2)] and "back to the beginning, for there is no checkpoint" in said
    caught_up = [event for event in events if event["event"] == "caught_up"]
    assert len(caught_up) == 3 and all(event["start_s"] > 0 for event in caught_up)
    # Steps 1 and 2 at the first loss, step 3 at the second, 3 and 4 at the third, each of 24 answers.
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["ledger/learned"], last["ledger/lost"]) == (6 * 24, 5 * 24)
