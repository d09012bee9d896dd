"""After each sync: does the generator give the same log-probabilities as the learner, on a few fixed tokens?

It is the only check that sees what no transport can: a tensor loaded into the wrong place, a head that was
not packed anew, a cache of the old weights, kernels that compute something else.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf_ray.errors import ConfigError

LogProbs = Sequence[Sequence[float]]

# Largest difference to expect between two correct implementations, in nats. float32: measured 1e-6 on CPU, with
# room for GPU reductions; bfloat16 carries 8 bits, so 0.01 to 0.1 on ordinary tokens and more on unlikely ones.
DEFAULT_BOUND = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}
# Above the bound, but below this many times it, rounding in other kernels is the likelier cause.
KERNEL_FACTOR = 10.0


class CanaryTarget(Protocol):
    @property
    def version(self) -> int: ...
    def logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class CanaryVerdict:
    absdiff_max: float  # nats; inf if not comparable
    ok: bool
    cause: str = ""  # "", "stale version", "wrong weights", "kernels" or "diverged"
    reason: str = ""  # one sentence for people, with what to do


class Canary:
    """Fixed token sequences and the learner's log-probabilities at the sync before.

    Args:
        tokens: sequences of at least two tokens, the same in the whole run.
        bound: largest accepted difference in nats.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], bound: float = DEFAULT_BOUND["float32"]) -> None:
        if not tokens or any(len(row) < 2 for row in tokens):
            raise ConfigError("sync canary: every sequence needs at least 2 tokens, else nothing is compared")
        if not bound > 0:
            raise ConfigError(f"sync.canary_bound={bound} can never hold; set it above 0")
        self.tokens = [list(row) for row in tokens]
        self.bound = bound
        self._previous: LogProbs | None = None

    def check(self, generators: Sequence[CanaryTarget], learner: LogProbs, version: int) -> list[CanaryVerdict]:
        """One verdict a generator. `learner`: its log-probs of `self.tokens` at temperature 1."""
        verdicts = [
            judge(
                generator.logprobs(self.tokens),
                learner,
                self._previous,
                held=generator.version,
                expected=version,
                bound=self.bound,
            )
            for generator in generators
        ]
        self._previous = [list(row) for row in learner]
        return verdicts


def judge(
    generator: LogProbs,
    learner: LogProbs,
    previous: LogProbs | None,
    *,
    held: int,
    expected: int,
    bound: float,
) -> CanaryVerdict:
    """Compare and name the cause: the weight version, the weights, or the kernels.

    Args:
        previous: the learner's log-probs at the sync before, to recognise a generator that was not updated.
        held, expected: the weight version that the generator reports, and the one just sent.
    """
    diff = absdiff_max(generator, learner)
    if held != expected:
        return CanaryVerdict(
            diff,
            False,
            "stale version",
            f"the generator holds weight version {held} where {expected} was sent: it missed the sync; "
            "replace it or sync again",
        )
    if diff <= bound:
        return CanaryVerdict(diff, True)
    if not all(math.isfinite(logp) for row in learner for logp in row):
        return CanaryVerdict(
            diff,
            False,
            "diverged",
            "the learner's own log-probabilities are not finite: its weights are broken, and the generator got what it "
            "was sent; go on from an earlier checkpoint with a lower learning rate",
        )
    before = math.inf if previous is None else absdiff_max(generator, previous)
    moved = 0.0 if previous is None else absdiff_max(learner, previous)
    if before <= bound < moved:  # else old weights and new ones cannot be told apart
        return CanaryVerdict(
            diff,
            False,
            "stale version",
            f"the generator says version {held} but answers as before that sync (difference {before:.2g} nats to "
            "the old weights): weights were not applied, or its prefix cache was not reset; replace it",
        )
    if diff <= KERNEL_FACTOR * bound:
        return CanaryVerdict(
            diff,
            False,
            "kernels",
            f"log-probabilities differ by {diff:.2g} nats, more than {bound:.2g} but little enough for rounding: "
            "another dtype or attention kernel in the generator; give both the same dtype, or raise "
            "sync.canary_bound",
        )
    return CanaryVerdict(
        diff,
        False,
        "wrong weights",
        f"log-probabilities differ by {diff:.2g} nats where {bound:.2g} is the bound: a tensor is missing or in the "
        "wrong place, or the model folders differ; replace the generator and compare both configurations",
    )


def absdiff_max(one: LogProbs, other: LogProbs) -> float:
    """Largest |difference|; inf where shapes differ or a number is not finite."""
    if [len(row) for row in one] != [len(row) for row in other]:
        return math.inf
    worst = 0.0
    for row, against in zip(one, other, strict=True):
        for a, b in zip(row, against, strict=True):
            diff = abs(a - b)
            if math.isnan(diff):
                return math.inf
            worst = max(worst, diff)
    return worst


def canary_tokens(vocab_size: int, *, count: int = 4, length: int = 16, seed: int = 0) -> list[list[int]]:
    """[count][length] token ids that depend on the arguments alone."""
    draw = random.Random(f"canary-{seed}-{vocab_size}")
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
