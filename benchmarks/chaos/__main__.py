"""Kills and stops processes of real runs in every phase, and says what became of the runs.

    python -m benchmarks.chaos                        the kill matrix: 80 cells, several in a run
    python -m benchmarks.chaos reward SIGSTOP         of it, the cells of these victims, phases and signals
    python -m benchmarks.chaos --show                 its table so far
    python -m benchmarks.chaos --soak                 100 kills of one long run; also with --overlapped
    python -m benchmarks.chaos --hunt 30              short overlapped runs with random delays and kills

A cell is a victim, a phase of the run and a signal. The victim announces itself and is struck there
(striker/sitecustomize.py); it has passed if the run ends by itself, with status 0 and no process left, and its weights,
metrics, prompts and answers are those of the undisturbed run, bit for bit. Rows are appended to WORK/table.jsonl; the
next call goes on with the cells that have not passed. The kills of a soak and of a hunt are drawn by --seed; of an
overlapped run, which is another each time, the books must be closed and each prompt learned from once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.chaos.cells import CELLS, PASSED, Cell, chosen, latest, markdown, packs, places, row_of
from benchmarks.chaos.monkey import hunt, soak
from benchmarks.chaos.runs import CALM_S, ENGINES, ROOT, TREE, calm_run, merged, problems_of, rows_of, run

# More for each strike, on a machine with other work.
EACH_S = 100.0
EVERY = TREE["checkpoint"]["every"]
PAGE, BEGIN, END = ROOT / "docs" / "faults.md", "<!-- the kill matrix, as measured -->", "<!-- its end -->"


def run_pack(work: Path, pack: Sequence[Cell], steps: int) -> list[dict[str, Any]]:
    """The rows of the cells of one run that were reached."""
    engine = pack[0].engine
    tree = merged(TREE, {"steps": steps, "generator": ENGINES[engine]})
    calm = calm_run(work, tree, f"{engine}-{steps}")
    folder = work / f"run-{int(time.time())}"
    strikes = [cell.strike(step) for cell, step in zip(pack, places(pack, EVERY), strict=True)]
    struck = run(folder, tree, strikes, bound_s=CALM_S + EACH_S * len(pack))
    problems = problems_of(struck, calm)
    rows = [row_of(cell, struck, problems, alone=len(pack) == 1) for cell in pack]
    return [{**row, "run": folder.name, "seconds": round(struck.seconds)} for row in rows if row is not None]


def matrix(work: Path, cells: Sequence[Cell], together: int, again: bool, runs: int | None) -> int:
    table = work / "table.jsonl"
    rows = {} if again else latest(rows_of(table))
    left = [cell for cell in cells if rows.get(cell.name, {}).get("outcome") != PASSED]
    steps = EVERY * together + 2  # the same for all, so that one undisturbed run serves
    for pack in islice(packs(left, rows, together), runs):
        print(f"{', '.join(cell.name for cell in pack)} ...", flush=True)
        for row in run_pack(work, pack, steps):
            with table.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[row["cell"]] = row
            print(json.dumps(row), flush=True)
    missing = [cell.name for cell in cells if rows.get(cell.name, {}).get("outcome") != PASSED]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells have passed")
    return int(bool(missing))


def put(table: str, page: Path) -> None:
    """The table into the page, between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def soaked(work: Path, given: argparse.Namespace) -> int:
    row = soak(work, given.seed, given.kills, given.overlapped, given.bound_s or CALM_S + EACH_S * given.kills)
    with (work / "soaks.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    return int(bool(row["problems"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help="victims, phases, signals, or whole names of cells; empty: all")
    parser.add_argument("--together", type=int, default=8, help="cells that share a run")
    parser.add_argument("--runs", type=int, help="stop after so many runs")
    parser.add_argument("--again", action="store_true", help="also those that have passed")
    parser.add_argument("--show", action="store_true", help="the table so far, and nothing else")
    parser.add_argument("--write", action="store_true", help="the table so far into docs/faults.md")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chaos")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--overlapped", action="store_true")
    parser.add_argument("--kills", type=int, default=100, help="of a soak")
    parser.add_argument("--hunt", type=int, default=0, metavar="RUNS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=500.0, help="of a hunt: the longest delay of a call")
    parser.add_argument("--bound-s", type=float, help="seconds that a soak, or each run of a hunt, may take")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    if given.soak:
        raise SystemExit(soaked(work, given))
    if given.hunt:
        bad = hunt(work, given.seed, given.hunt, given.delay_ms, given.bound_s or 2 * CALM_S)
        print(f"{given.hunt - len(bad)} of {given.hunt} runs have ended well")
        raise SystemExit(int(bool(bad)))
    if given.show or given.write:
        table = markdown(latest(rows_of(work / "table.jsonl")))
        print(table, end="")
        if given.write:
            put(table, PAGE)
        return
    cells = chosen(given.cells) if given.cells else list(CELLS)
    raise SystemExit(matrix(work, cells, given.together, given.again, given.runs))


if __name__ == "__main__":
    main()
