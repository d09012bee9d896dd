"""Which answers to a prompt are compared, and who wins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.evaluation.winrate import win_rate
from rlhf_ray.rewards.judge import Judge, Verdict, compare_both_orders

Winner = Literal["first", "second", "tie", "none"]


@dataclass(frozen=True)
class Candidate:
    """Two answers to one prompt, by their rows."""

    prompt: int
    first: int
    second: int


@dataclass(frozen=True)
class Label:
    """`winner` none: it could not be judged. `margin`: in units of the reward, or in nats of a local judge."""

    winner: Winner
    margin: float | None = None
    verdict: Verdict | None = None


def candidates_of(
    pairing: Literal["all", "disjoint", "best_worst"], samples: int, scores: Sequence[float], prompts: int
) -> list[Candidate]:
    """The pairs to compare; rows are prompt-major. `scores` (one a row) are used by best_worst only.

    best_worst takes the first of the best and the last of the worst answers, so answers that all score the same make
    a pair, which is a tie.
    """
    found = []
    for prompt in range(prompts):
        rows = range(prompt * samples, (prompt + 1) * samples)
        if pairing == "best_worst":
            scored = [row for row in rows if math.isfinite(scores[row])]
            picked = [_best_and_worst(scored, scores)] if len(scored) > 1 else []
        elif pairing == "disjoint":
            picked = list(zip(rows[::2], rows[1::2], strict=False))  # of an odd number the last one has no partner
        else:
            picked = list(itertools.combinations(rows, 2))
        found += [Candidate(prompt, first, second) for first, second in picked]
    return found


def _best_and_worst(rows: Sequence[int], scores: Sequence[float]) -> tuple[int, int]:
    return max(rows, key=scores.__getitem__), min(reversed(rows), key=scores.__getitem__)


def label_by_score(first: Sequence[float], second: Sequence[float], min_margin: float = 0.0) -> list[Label]:
    """The higher score wins; a difference of no more than `min_margin` is a tie, a missing score (NaN) no label."""
    labels = []
    for a, b in zip(first, second, strict=True):
        difference = a - b
        if not math.isfinite(difference):
            labels.append(Label("none"))
        elif abs(difference) <= min_margin:
            labels.append(Label("tie", abs(difference)))
        else:
            labels.append(Label("first" if difference > 0 else "second", abs(difference)))
    return labels


def label_by_judge(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[Label]:
    """Both orders of each pair; orders that disagree are a tie. Raises RewardError if nothing can be judged."""
    verdicts = compare_both_orders(judge, prompts, first, second) if prompts else []
    return [
        Label(verdict.winner, verdict.margin, verdict) if isinstance(verdict, Verdict) else Label("none")
        for verdict in verdicts
    ]


def order_bias(labels: Sequence[Label]) -> dict[str, float]:
    """How a judge depends on the order. Empty where nothing was labelled by one.

    `order_bias_rate`: share of the pairs in which it named the same place both times, and so contradicted itself.
    `named_first_rate`: of all single verdicts that were no tie, the share for what stood first; 0.5 without a bias.
    """
    verdicts = [label.verdict for label in labels if label.verdict is not None]
    if not verdicts:
        return {}
    named = [choice for v in verdicts for choice in (v.forward, v.backward) if choice != "tie"]
    rates = {"order_bias_rate": sum(v.position_bias for v in verdicts) / len(verdicts)}
    if named:
        rates["named_first_rate"] = sum(choice == "A" for choice in named) / len(named)
    return rates


def agreement(labels: Sequence[Label], confidence: float = 0.95) -> dict[str, Any]:
    """How often the label is the human's, where the human's choice stood first.

    `agreement` = agreed / (agreed + disagreed), with Wilson's interval; ties and pairs without a label are counted.
    """
    outcome = {"first": 1, "second": -1, "tie": 0}
    judged = [label for label in labels if label.winner != "none"]
    rate = win_rate([[outcome[label.winner]] for label in judged], confidence=confidence)
    return {
        "agreement": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "confidence": confidence,
        "agreed": rate.wins,
        "disagreed": rate.losses,
        "ties": rate.ties,
        "unjudged": len(labels) - len(judged),
        **order_bias(labels),
    }
