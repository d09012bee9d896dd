"""Win rate = wins / (wins + losses), with a confidence interval. Ties are counted and left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RESAMPLES = 2000


@dataclass(frozen=True)
class WinRate:
    """`rate` and the interval are None where nothing was decided."""

    wins: int
    losses: int
    ties: int
    rate: float | None
    low: float | None
    high: float | None
    confidence: float
    interval: str  # how it was found: wilson or bootstrap

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def outcomes_of_scores(
    ours: Sequence[float], theirs: Sequence[float], same: Sequence[bool], tie_margin: float = 0.0
) -> list[int]:
    """1 where ours is better, -1 where theirs is, 0 where they differ by no more than `tie_margin`.

    So is the `same` answer of both whose scores differ in the last bits: a model scored it in two batches. A pair of
    which one has no score (NaN: its reward failed) is no comparison and is left out.
    """
    outcomes = []
    for a, b, equal in zip(ours, theirs, same, strict=True):
        if math.isfinite(a - b):
            tied = abs(a - b) <= tie_margin or equal and math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
            outcomes.append(0 if tied else 1 if a > b else -1)
    return outcomes


def win_rate(outcomes_by_prompt: Sequence[Sequence[int]], *, confidence: float = 0.95, seed: int = 0) -> WinRate:
    """From comparisons (1 win, -1 loss, 0 tie), one list a prompt.

    One comparison a prompt: they are independent, and Wilson's score interval (1927) holds, at 0 and 1 too. Several
    answers to one prompt are not independent: then whole prompts are drawn again (percentile bootstrap; Efron, 1979).
    After wins only or losses only, and with one decided prompt, that interval would have no width: Wilson's then, with
    one observation a decided prompt.
    """
    wins = sum(o > 0 for prompt in outcomes_by_prompt for o in prompt)
    losses = sum(o < 0 for prompt in outcomes_by_prompt for o in prompt)
    ties = sum(map(len, outcomes_by_prompt)) - wins - losses
    if wins + losses == 0:
        return WinRate(wins, losses, ties, None, None, None, confidence, "none")
    rate = wins / (wins + losses)
    decided = [prompt for prompt in outcomes_by_prompt if any(prompt)]
    if all(len(prompt) == 1 for prompt in decided) or len(decided) == 1 or wins == 0 or losses == 0:
        low, high = wilson(round(rate * len(decided)), len(decided), confidence)
        return WinRate(wins, losses, ties, rate, low, high, confidence, "wilson")
    low, high = _bootstrap(decided, confidence, seed)
    return WinRate(wins, losses, ties, rate, low, high, confidence, "bootstrap")


def wilson(wins: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share. `count` is at least 1."""
    from scipy.stats import binomtest

    interval = binomtest(wins, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(decided: Sequence[Sequence[int]], confidence: float, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    wins_P = [sum(o > 0 for o in prompt) for prompt in decided]
    losses_P = [sum(o < 0 for o in prompt) for prompt in decided]

    def rate(wins: Any, losses: Any, axis: int) -> Any:
        # A decided prompt has a win or a loss, so no draw divides by 0.
        return wins.sum(axis) / (wins.sum(axis) + losses.sum(axis))

    interval = bootstrap(
        (wins_P, losses_P), rate, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=confidence,
        method="percentile", rng=seed,
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)
