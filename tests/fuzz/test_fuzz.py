"""Spoiled rows and configs, all in one process: a covering selection here, everything with `make fuzz`.

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
