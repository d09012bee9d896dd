"""Of the kill matrix (`make chaos`, docs/faults.md), a selection with every role and every phase, in one run."""

from __future__ import annotations

import pytest

from benchmarks.chaos.cells import PASSED, Cell, row_of
from benchmarks.chaos.runs import ENGINES, TREE, calm_run, merged, problems_of, run

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

# One in each step, from the second on. vLLM's generators are killed in tests/remote/test_vllm_deepspeed.py.
CELLS = [
    Cell("generator(hf)", "generating", "SIGKILL"),
    Cell("reward", "scoring", "SIGSTOP"),
    Cell("learner rank 1", "updating", "SIGKILL"),
    Cell("reference", "syncing", "SIGKILL"),
    Cell("critic", "checkpointing", "SIGKILL"),
    Cell("learner rank 0", "syncing", "SIGKILL"),
    Cell("driver", "updating", "SIGKILL"),
]
# Of the others only the lost process is replaced.
BACK = "replaced, and back to the checkpoint"
REMEDIES = {"learner": BACK, "critic": BACK, "driver": "run started again"}


def test_whoever_is_struck_whenever_the_run_ends_as_if_nothing_had_happened(tmp_path):
    tree = merged(TREE, {"steps": len(CELLS) + 1, "generator": ENGINES["hf"]})
    calm = calm_run(tmp_path, tree, "hf")
    strikes = [cell.strike(step) for step, cell in enumerate(CELLS, start=2)]
    struck = run(tmp_path / "struck", tree, strikes, bound_s=1200)
    assert not problems_of(struck, calm), struck.log[-3000:]
    for cell in CELLS:
        row = row_of(cell, struck, [], alone=True)
        assert row["outcome"] == PASSED, row
        assert row["remedy"] == REMEDIES.get(cell.victim.partition(" rank")[0], "replaced"), row
