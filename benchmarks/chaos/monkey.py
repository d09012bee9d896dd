"""Random strikes, by a seed: the soak, one long run that is struck over and over, and the hunt for dead-locks.

Whoever is struck in which phase of which step is drawn before the run begins, so a seed repeats a soak; what the
machine's clocks make of it is not drawn.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos.cells import PHASES, costs_of
from benchmarks.chaos.runs import (
    ENGINES,
    OVERLAPPED,
    TREE,
    Strike,
    Struck,
    calm_run,
    merged,
    open_books,
    problems_of,
    run,
)

# Of 100 kills. Those whose repair takes longest are the fewest.
VICTIMS = {
    "generator": 40, "reference": 15, "reward": 15, "critic": 10, "learner rank 0": 7, "learner rank 1": 7, "driver": 6,
}  # fmt: skip
# A run without a critic and with one rank starts in half the time, and all that overlaps is there.
SHORT: dict[str, Any] = {
    "steps": 5, "algorithm": {"name": "grpo"}, "rollout": {"group_size": 4, "prompts_per_step": 4},
    "learner": {"engine": "torch", "world_size": 1, "zero_stage": 0, "epochs": 1, "minibatches": 1},
}  # fmt: skip
LONGEST_MS = 60.0
KILLS_A_STEP = 2
# No waiting before a restart: a hundred losses in an hour are what this is for.
AT_ONCE = {"CHAOS_BACK_OFF_S": "0"}


def strikes_of(seed: int, count: int, steps: int, victims: Mapping[str, int] = VICTIMS) -> list[Strike]:
    """`count` kills, each in a random phase of a random step but the first and the last."""
    draw = random.Random(seed)
    chosen = draw.choices(list(victims), list(victims.values()), k=count)
    places = sorted((draw.randint(2, steps - 1), draw.randrange(len(PHASES))) for _ in chosen)
    return [
        Strike(f"{number} {victim}", victim, PHASES[phase], step, "SIGKILL", round(draw.uniform(0, LONGEST_MS), 1))
        for number, (victim, (step, phase)) in enumerate(zip(chosen, places, strict=True))
    ]


def soak(work: Path, seed: int, kills: int, overlapped: bool, bound_s: float) -> dict[str, Any]:
    """One long run with so many kills; the row says what became of it."""
    steps = max(6, kills // KILLS_A_STEP)
    tree = merged(TREE, OVERLAPPED if overlapped else {}, {"steps": steps, "generator": ENGINES["hf"]})
    strikes = strikes_of(seed, kills, steps)
    folder = work / f"soak-{'overlapped' if overlapped else 'synchronous'}-{seed}-{int(time.time())}"
    calm = None if overlapped else calm_run(work, tree, f"soak-{steps}")
    struck = run(folder, tree, strikes, bound_s=bound_s, restarts=kills, environment=AT_ONCE)
    problems = problems_of(struck, calm) or ([*open_books(folder, tree["rollout"]["group_size"])] if overlapped else [])
    if len(struck.words) < kills and not problems:
        problems = [f"only {len(struck.words)} of {kills} were struck"]
    return {"mode": "overlapped" if overlapped else "synchronous", "seed": seed, "steps": steps,
            **told(struck), "problems": problems, "run": folder.name}  # fmt: skip


def told(struck: Struck) -> dict[str, Any]:
    """What happened, in numbers."""
    costs = [costs_of(words, struck) for words in struck.words]
    return {
        "kills": len(struck.words),
        "victims": dict(Counter(words["seat"] for words in struck.words)),
        "phases": dict(Counter(words["phase"] for words in struck.words)),
        "remedies": dict(Counter(cost.get("remedy", "none seen") for cost in costs)),
        "seconds": round(struck.seconds),
    }


def hunt(work: Path, seed: int, runs: int, delay_ms: float, bound_s: float) -> list[dict[str, Any]]:
    """Short overlapped runs whose calls are late by chance, each with up to three kills; rows of those that did not end
    well, and a line for each."""
    bad = []
    tree = merged(TREE, OVERLAPPED, SHORT)
    victims = {name: weight for name, weight in VICTIMS.items() if name not in ("critic", "learner rank 1")}
    for number in range(seed, seed + runs):
        strikes = strikes_of(number, 1 + number % 3, tree["steps"], victims)
        folder = work / f"hunt-{number}-{int(time.time())}"
        environment = {**AT_ONCE, "CHAOS_DELAY_MS": str(delay_ms), "CHAOS_SEED": str(number)}
        struck = run(folder, tree, strikes, bound_s=bound_s, environment=environment)
        problems = problems_of(struck, None) or [*open_books(folder, tree["rollout"]["group_size"])]
        row = {"run": folder.name, **told(struck), "problems": problems}
        print(json.dumps(row), flush=True)
        bad += [row] if problems else []
    return bad
