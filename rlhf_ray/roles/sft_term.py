"""The supervised part of a policy's loss (PPO-ptx): other rows, which it learns while it is reinforced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.stream import Part, stream_over
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.roles.division import split_items
from rlhf_ray.roles.objectives import SFT

# One forward pass: its share of the loss, and what was counted.
MicroLoss = Callable[[], tuple[Tensor, Mapping[str, Tensor | float]]]


@dataclass(frozen=True)
class SFTRows:
    """Rows to learn, the sources that they come from, one after the other, and how many each optimiser step takes."""

    examples: tuple[TokenizedExample, ...]
    parts: tuple[Part, ...]
    batch_size: int


class SFTTerm:
    """`coef` times the mean negative log-likelihood a token of `rows.batch_size` rows, in every optimiser step.

    Ouyang et al. 2022 (InstructGPT), eq. 2, the term with gamma. Which rows an optimiser step takes is a pure function
    of the seed and the step's number, so a resumed run needs no more than that. Every rank holds all rows and computes
    its share of them, in as many forward and backward passes as every other.
    """

    def __init__(self, rows: SFTRows, objective: SFT, *, coef: float, seed: int, tokens_per_microbatch: int) -> None:
        self.examples = rows.examples
        self.objective = objective
        self.coef = coef
        self.batch_size = rows.batch_size
        self.tokens_per_microbatch = tokens_per_microbatch
        # Not the seed of the prompts: a file that holds both would come in the same order.
        self._stream = stream_over(rows.parts, seed + 1)

    def rows(self, number: int) -> list[int]:
        """The rows of optimiser step 0, 1, ... of the run."""
        return [row for _, row in self._stream.take(number * self.batch_size, self.batch_size)]

    def losses(self, engine: TrainEngine, number: int) -> list[MicroLoss]:
        """This rank's forward passes in that optimiser step; what they return adds up to the term, over all ranks."""
        items = [self.examples[row] for row in self.rows(number)]
        lengths = [self.objective.lengths(item) for item in items]
        micro = split_items(lengths, self.tokens_per_microbatch, engine.rank, engine.world_size)
        tokens = max(1, sum(map(self.objective.weight, items)))
        parts = [[items[place] for place in places] for places in micro.parts]
        return [partial(self._loss, engine, part, tokens, index < micro.real) for index, part in enumerate(parts)]

    def _loss(
        self, engine: TrainEngine, items: Sequence[TokenizedExample], tokens: int, is_real: bool
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """`tokens`: learned ones in the whole optimiser step. A dummy costs a pass, and counts for nothing."""
        batch = self.objective.collate(items).to(engine.device)
        measured = self.objective.measure(engine(**self.objective.inputs(batch)), batch)
        nll = measured["loss"].sum() * (is_real / tokens)
        return self.coef * nll, {
            "loss/sft": nll.detach(),
            "sft/tokens": measured["weight"].sum() * is_real,
            "tokens_computed": batch.tokens.numel(),
            "tokens_wanted": batch.attention_mask.sum() * is_real,
        }
