"""Whether the better answers are the longer ones: what a judge that learns from pairs may learn instead of quality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# A judge that looks at nothing but length would be right so often, or its correlation would be so high.
STRONG_SHARE, STRONG_CORRELATION = 0.7, 0.6
FEWEST_PAIRS = 20


@dataclass(frozen=True)
class LengthBalance:
    """Of `pairs` pairs: the share in which the chosen answer is longer, of those that differ in length; the mean
    lengths; and the correlation (Pearson) of an answer's length with being the chosen one (1) or not (0).

    `unit` is words or tokens. A number is None where it is not defined (all of one length).
    """

    pairs: int
    longer: float | None
    chosen_mean: float
    rejected_mean: float
    correlation: float | None
    unit: str

    @property
    def is_strong(self) -> bool:
        """Whether a policy would learn to write longer (or shorter) answers from a judge of these pairs."""
        if self.pairs < FEWEST_PAIRS or self.longer is None or self.correlation is None:
            return False
        return max(self.longer, 1 - self.longer) >= STRONG_SHARE or abs(self.correlation) >= STRONG_CORRELATION

    @property
    def advice(self) -> str:
        """For a strong imbalance: what it means and what to do."""
        assert self.longer is not None
        longer = self.longer >= 0.5
        return (
            f"a judge that always takes the {'longer' if longer else 'shorter'} answer is right in "
            f"{max(self.longer, 1 - self.longer):.0%} of these pairs, and a policy would learn to write "
            f"{'longer' if longer else 'shorter'} ones; balance the lengths of the pairs, or add a length penalty"
        )

    def __str__(self) -> str:
        longer = "equal in all pairs" if self.longer is None else f"the chosen one is longer in {self.longer:.0%}"
        correlation = "" if self.correlation is None else f", correlation of length and choice {self.correlation:+.2f}"
        return (
            f"length of answers: {longer}, {self.unit} on average {self.chosen_mean:.1f} (chosen) and "
            f"{self.rejected_mean:.1f} (rejected){correlation}"
        )


def length_balance(lengths: Iterable[tuple[int, int]], unit: str) -> LengthBalance | None:
    """From (chosen, rejected) lengths of each pair; None where there is no pair."""
    found = np.array(list(lengths), dtype=float).reshape(-1, 2)
    if not len(found):
        return None
    chosen, rejected = found[:, 0], found[:, 1]
    unequal = chosen != rejected
    longer = float((chosen > rejected)[unequal].mean()) if unequal.any() else None
    correlation = None
    if found.std() > 0:
        label = np.repeat([1.0, 0.0], len(found))
        correlation = float(np.corrcoef(np.concatenate([chosen, rejected]), label)[0, 1])
    return LengthBalance(len(found), longer, float(chosen.mean()), float(rejected.mean()), correlation, unit)
