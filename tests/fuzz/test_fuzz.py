"""Spoiled rows, configs and run directories, in one process: a covering selection here, all with `make fuzz`.

A failure names its case; `pytest tests/fuzz -k rows` with FUZZ=all runs all 1,000 of them, which are always the same.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fuzz_configs import check_config, config_cases
from fuzz_harness import Case, Hang, covering
from fuzz_rows import check_rows, row_cases
from fuzz_runs import Checked, run_cases

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.start.rl import run_rl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SELECTED = 100


def selection(cases: Sequence[Case]) -> Sequence[Case]:
    return cases if os.environ.get("FUZZ") == "all" else covering(cases, SELECTED)


def run(cases: Sequence[Case], check: Callable[[Case, Path], str]) -> Counter[str]:
    """What became of the cases; fails with all that went wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for case in selection(cases):
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[check(case, Path(folder))] += 1
            except (Exception, Hang) as error:
                wrong.append(f"{case}: {type(error).__name__}: {error}"[:600])
    assert not wrong, f"{len(wrong)} of {len(selection(cases))}:\n" + "\n".join(wrong)
    return outcomes


def test_rows():
    """No traceback, file and line in every complaint, and validate-data agrees with what each command loads."""
    outcomes = run(row_cases(1000), check_rows)
    assert len(outcomes) > 3, f"some are good for one command, some for another: {outcomes}"


def test_configs():
    """Each is valid or refused in readable words; nothing is executed."""
    outcomes = run(config_cases(500), check_config)
    assert set(outcomes) == {"valid", "refused"}, outcomes


def test_run_directories(tmp_path, tiny_tree):
    """A resume takes the newest whole checkpoint, whatever is wrong beside it, and never a damaged one."""
    tree = {**tiny_tree, "steps": 4, "checkpoint": {"every": 2}, "eval": {"size": 2, "best_by": "reward"}}
    config = parse_config(tree, RunConfig, "tiny")
    run_rl(config, tmp_path / "run")
    outcomes = run(run_cases(300), Checked(tmp_path / "run", config))
    assert set(outcomes) == {"detected", "harmless"}, outcomes
