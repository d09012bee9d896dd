"""The cells of the kill matrix: which of them share a run, what a run says of each, and their table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from benchmarks.chaos.runs import Strike, Struck, first

VICTIMS = (
    "generator(vllm)", "generator(hf)", "reference", "reward", "critic", "learner rank 0", "learner rank 1", "driver",
)  # fmt: skip
PHASES = ("generating", "scoring", "updating", "syncing", "checkpointing")
SIGNALS = ("SIGKILL", "SIGSTOP")
PASSED, FAILED, UNCLEAR = "passed", "failed", "unclear"


@dataclass(frozen=True)
class Cell:
    victim: str
    phase: str
    signal: str

    @property
    def name(self) -> str:
        return f"{self.victim}/{self.phase}/{self.signal}"

    @property
    def engine(self) -> str:
        """Of the generators in its run."""
        return "vllm" if self.victim == "generator(vllm)" else "hf"

    def strike(self, step: int) -> Strike:
        # In the midst of the weights, not before them.
        call = ("update_weights",) if self.victim.startswith("generator") and self.phase == "syncing" else ()
        return Strike(self.name.replace("/", " "), self.victim.partition("(")[0], self.phase, step, self.signal,
                      after_ms=5.0, call=call)  # fmt: skip


CELLS = tuple(Cell(*parts) for parts in product(VICTIMS, PHASES, SIGNALS))


def chosen(words: Sequence[str]) -> list[Cell]:
    """The cells all of whose given kinds (victims, phases, signals) are named; whole names, too. Nothing: all."""
    if unknown := set(words) - {*VICTIMS, *PHASES, *SIGNALS, *(cell.name for cell in CELLS)}:
        raise SystemExit(f"chaos: unknown: {', '.join(sorted(unknown))}; victims are {', '.join(VICTIMS)}")
    named = [cell for cell in CELLS if cell.name in words]
    kinds = [set(words) & set(kind) for kind in (VICTIMS, PHASES, SIGNALS)]
    fits = [
        cell for cell in CELLS
        if all(not kind or part in kind for kind, part in zip(kinds, vars(cell).values(), strict=True))
    ]  # fmt: skip
    return named if named and not any(kinds) else fits


def latest(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last row of each cell."""
    return {row["cell"]: row for row in rows}


def packs(cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]], together: int) -> Iterator[list[Cell]]:
    """Cells that share a run, the victims in turns. What has not passed in company is run alone."""
    alone = [cell for cell in cells if cell.name in rows and rows[cell.name]["outcome"] != PASSED]
    for engine in ("hf", "vllm"):
        left = [cell for cell in cells if cell.engine == engine and cell not in alone]
        turns = zip_longest(*([cell for cell in left if cell.victim == victim] for victim in VICTIMS))
        queue = [cell for turn in turns for cell in turn if cell is not None]
        yield from (queue[i : i + together] for i in range(0, len(queue), together))
    yield from ([cell] for cell in alone)


def places(pack: Sequence[Cell], every: int) -> list[int]:
    """The step in which each is struck: one in each, from the second on; checkpoints come after `every` steps."""
    steps: list[int] = []
    for cell in pack:
        step = steps[-1] + 1 if steps else 2
        steps.append(step + (-step % every if cell.phase == "checkpointing" else 0))
    return steps


# ---- what a run says of a cell ----------------------------------------------------------------------------------


def row_of(cell: Cell, struck: Struck, problems: Sequence[str], alone: bool) -> dict[str, Any] | None:
    """A line of the table; None if the cell was not reached."""
    words = next((w for w in struck.words if w["id"] == cell.name.replace("/", " ")), None)
    if words is None and not alone:
        return None
    row: dict[str, Any] = {"cell": cell.name, "outcome": PASSED}
    if words is not None:
        row |= {name: words[name] for name in ("seat", "pid", "step", "call", "after_ms")}
        row |= costs_of(words, struck)
    problems = [*problems, *([] if words else ["it was not struck"]), *missing_in(row, words, struck)]
    if problems:
        row |= {"outcome": FAILED if alone else UNCLEAR, "why": "; ".join(problems)}
    return row


def costs_of(words: Mapping[str, Any], struck: Struck) -> dict[str, Any]:
    """Seconds from the strike until it was noticed, from there until the seat was taken again, and from there until
    the struck phase of that step was over; and how it was mended."""
    at, events = words["time"], struck.events
    own = [event for event in events if is_of(event.get("worker", ""), words["seat"])]
    # What comes after the next strike is that one's.
    next_at = min((other["time"] for other in struck.words if other["time"] > at), default=math.inf)
    until_next = [event for event in events if event["time"] < next_at]
    again = first(until_next, "restarted", at)  # the whole run
    noticed = first(own, "worker_lost", at) if words["seat"] != "driver" else again
    back, remedy = first(own, "worker_restarted", at), "replaced"
    if back is None or again is not None:
        back, remedy = again and first(of_loop(struck), "step", again), "run started again"
        noticed = again if noticed is None else noticed
    elif first(until_next, "rewound", at) is not None:
        remedy = "replaced, and back to the checkpoint"
    seconds: dict[str, Any] = {}
    if noticed is not None:
        seconds["detect_s"] = round(noticed - at, 1)
    if noticed is not None and back is not None:
        ends = [
            row["time"] for row in struck.phases
            if row["what"] == "end" and row["phase"] == words["phase"] and row["step"] >= words["step"]
            and row["time"] > at
        ]  # fmt: skip
        # Where the phase was over before the seat was taken again, nobody had to wait for it.
        over = min(ends, default=back)
        seconds |= {"start_s": round(back - noticed, 1), "replay_s": round(max(0.0, over - back), 1), "remedy": remedy}
    return seconds


def is_of(worker: str, seat: str) -> bool:
    """Ranks of a group are lost together, and any of them may be named."""
    return worker == seat or (" rank " in seat and worker.startswith(seat.partition(" rank ")[0] + " rank "))


def of_loop(struck: Struck) -> list[dict[str, Any]]:
    return [{"event": "step", "time": row["time"]} for row in struck.phases if row["what"] == "step"]


def missing_in(row: Mapping[str, Any], words: Mapping[str, Any] | None, struck: Struck) -> Iterator[str]:
    """What the log does not say of a strike and should."""
    if words is None:
        return
    if words["phase"] not in (words["doing"] or ()):
        yield f"the run was {words['doing']} when it was struck"
    if "detect_s" not in row:
        yield "nobody noticed it"
    elif words["seat"] != "driver":
        lost = [e for e in struck.events if e["event"] == "worker_lost" and e["worker"] == words["seat"]]
        if lost and not any(f"pid {words['pid']})" in event["reason"] for event in lost):
            yield f"another process than {words['pid']} was found lost"


# ---- the table --------------------------------------------------------------------------------------------------


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each signal: a line a victim, a column a phase."""
    return "\n".join(f"{sign}:\n\n{_of_signal(sign, rows)}" for sign in SIGNALS)


def _of_signal(sign: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| struck while the run is | {' | '.join(PHASES)} | mended by |", "| ---" * (len(PHASES) + 2) + " |"]
    for victim in VICTIMS:
        found = [rows.get(Cell(victim, phase, sign).name, {}) for phase in PHASES]
        remedies = sorted({row["remedy"] for row in found if row.get("remedy")})
        lines.append(f"| {victim} | {' | '.join(map(seconds, found))} | {'; '.join(remedies)} |")
    return "\n".join(lines) + "\n"


def seconds(row: Mapping[str, Any]) -> str:
    if not row:
        return "not run"
    parts = " + ".join(f"{row[name]:.1f}" for name in ("detect_s", "start_s", "replay_s") if name in row)
    return parts if row["outcome"] == PASSED else f"**{row['outcome']}** {parts}".strip()
