"""The trainer of a supervised run: one optimiser step at a time, on any number of ranks, whatever the objective.

Every rank holds all the data and is told which rows a step takes; it picks its own share of them. So the same call
works for one process and for N, and only row numbers travel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_ray.data.completion_text import CompletionText
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.stream import by_turns
from rlhf_ray.data.turn_end import turn_end_ids
from rlhf_ray.models.devices import peak_memory_gb
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.fits import positions_of
from rlhf_ray.models.loading import load_policy
from rlhf_ray.models.trainable import SkippedSteps
from rlhf_ray.roles.checkpointed import Checkpointed
from rlhf_ray.roles.division import Microbatches, split_items
from rlhf_ray.roles.objectives import Measured, Objective, language_model_inputs, pad_examples
from rlhf_ray.roles.preferences import ReferencedPair, answer_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# By split. Of each pair (chosen, rejected), each summed over the tokens of its answer; KTO: see roles/kto.py.
ReferenceLogprobs = dict[str, list[tuple[float, ...]]]


@dataclass(frozen=True)
class SplitResult:
    """An evaluation: metrics by name, and details that are no single number (histograms)."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


class SupervisedTrainer(Checkpointed):
    """`splits` are lists of items by name; `train` is what `step` takes its rows from."""

    devices = 1.0
    rejoin: Callable[[], Mapping[str, float]] = dict  # as in `roles.protocols.Roles`

    def __init__(
        self,
        engine: TrainEngine,
        objective: Objective,
        splits: dict[str, list[Any]],
        *,
        tokens_per_microbatch: int,
        tokenizer: PreTrainedTokenizerBase,
        max_skipped_steps: int = 20,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.splits = dict(splits)
        self.tokens_per_microbatch = tokens_per_microbatch
        self.tokenizer = tokenizer
        self._skipped = SkippedSteps(max_skipped_steps)

    def step(self, rows: Sequence[int], lr: float) -> dict[str, float]:
        """One optimiser step on these rows of `train`; metrics by their final names.

        A step whose gradient is not finite is skipped and counted in `skipped_steps`; too many in a row raise
        DivergenceError.
        """
        items = self.ready([self.splits["train"][row] for row in rows])
        total, micro = sum(map(self.objective.weight, items)), self._microbatches(items)
        measured: list[Measured] = []
        for index, places in enumerate(micro.parts):
            found = self._measure([items[place] for place in places])
            real = float(index < micro.real)
            self.engine.backward(found["loss"].sum() * (real / max(total, 1)), last=index == len(micro.parts) - 1)
            measured.append(found)
        norm = self.engine.step(lr)
        self._skipped.count(norm)
        gathered = self._gathered(len(items), micro, measured)
        return {
            **self.objective.metrics(gathered),
            **self._by_source(items, gathered),
            "grad_norm": norm,
            "lr": lr,
            "skipped_steps": float(not math.isfinite(norm)),
            "tokens": float(sum(sum(self.objective.lengths(item)) for item in items)),
            "perf/padding_frac": micro.padding,
            "perf/peak_mem_gb": peak_memory_gb(self.engine.device),
        }

    def evaluate(self, split: str, limit: int | None = None) -> SplitResult:
        """The objective's report on the first `limit` items of a split, of several sources in turn. Collective."""
        items = self.ready([self.splits[split][place] for place in self.places(split, limit)])
        measured = self._measure_all(items)
        metrics, details = self.objective.report(measured)
        return SplitResult({**metrics, **self._by_source(items, measured)}, details)

    def places(self, split: str, limit: int | None) -> Sequence[int]:
        """Where in a split the items are that `evaluate` looks at."""
        items = self.splits[split]
        if limit is None or limit >= len(items):
            return range(len(items))
        return by_turns([item.source for item in items])[:limit]

    def ready(self, items: list[Any]) -> list[Any]:
        """The items with what the objective has to know of all of them before it can measure one. Collective."""
        return items

    def _by_source(self, items: Sequence[Any], measured: Measured) -> dict[str, float]:
        """The objective's metrics of each source that has a name: of its rows alone."""
        places: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            if item.source:
                places.setdefault(item.source, []).append(place)
        metrics: dict[str, float] = {}
        for name, own in sorted(places.items()):
            found = self.objective.metrics({key: values[own] for key, values in measured.items()})
            metrics |= {f"source/{name}/{metric}": value for metric, value in found.items()}
            metrics[f"source/{name}/count"] = float(len(own))
        return metrics

    @torch.no_grad()
    def _measure_all(self, items: Sequence[Any]) -> Measured:
        micro = self._microbatches(items)
        measured = [self._measure([items[place] for place in places]) for places in micro.parts]
        return self._gathered(len(items), micro, measured)

    def _measure(self, items: Sequence[Any]) -> Measured:
        batch = self.objective.collate(items).to(self.engine.device)
        return self.objective.measure(self.engine(**self.objective.inputs(batch)), batch)

    def _microbatches(self, items: Sequence[Any]) -> Microbatches:
        """Micro-batches of items of about the same length, balanced over the ranks."""
        rows = [self.objective.lengths(item) for item in items]
        return split_items(rows, self.tokens_per_microbatch, self.engine.rank, self.engine.world_size)

    def _gathered(self, count: int, micro: Microbatches, measured: Sequence[Measured]) -> Measured:
        """What all ranks have measured, in the order of the items: [items] float64 on the CPU. Collective."""
        names = sorted(measured[0])
        table = torch.zeros(count, len(names), dtype=torch.float64)
        for places, found in list(zip(micro.parts, measured, strict=True))[: micro.real]:
            columns = [found[name].detach().cpu().double() for name in names]  # in this order: MPS has no float64
            table[list(places)] = torch.stack(columns, 1)
        if self.engine.world_size > 1:
            table = self.engine.all_reduce(table)
        return dict(zip(names, table.unbind(1), strict=True))

    @torch.no_grad()
    def logprobs(
        self, groups: Sequence[Sequence[TokenizedExample]], model: Any = None
    ) -> list[tuple[float, ...]]:
        """Of each sequence the log-probability of its learned tokens, summed; `model`: of another one. Collective.

        Groups are of one size, and go through the model as the items of an objective do that makes rows of them: so the
        policy that it is at a run's start differs from its reference by exactly 0 wherever the batches are the same.
        """
        if not groups:
            return []
        sizes = [tuple(len(example.token_ids) for example in group) for group in groups]
        micro = split_items(sizes, self.tokens_per_microbatch, self.engine.rank, self.engine.world_size)
        measured = []
        for places in micro.parts:
            rows = [groups[place][column] for column in range(len(sizes[0])) for place in places]
            batch = pad_examples(rows, self.tokenizer.pad_token_id).to(self.engine.device)
            outputs = (model or self.engine)(**language_model_inputs(batch))
            columns = answer_logprobs(outputs, batch).chunk(len(sizes[0]))
            measured.append({str(column): logp_N for column, logp_N in enumerate(columns)})
        table = self._gathered(len(groups), micro, measured)
        return list(zip(*(table[str(column)].tolist() for column in range(len(sizes[0]))), strict=True))

    def reference_logprobs(
        self, path: str | None = None, batches: Sequence[Sequence[int]] = (), sample: int | None = None
    ) -> ReferenceLogprobs:
        """DPO: (chosen, rejected) log-probabilities of every pair in every split, under the policy as it is now.

        Before the first step that is the reference policy, so no second model is kept in memory. `path` names
        another reference, which is loaded for this and let go. Collective. `batches` and `sample` are KTO's.
        """
        model = self.reference_model(path)
        pairs = {name: [(pair.chosen, pair.rejected) for pair in split] for name, split in self.splits.items()}
        return {name: self.logprobs(groups, model) for name, groups in pairs.items()}

    def reference_model(self, path: str | None) -> Any:
        """None: the policy itself, as it is now."""
        if path is None:
            return None
        dtype = next(self.engine.module.parameters()).dtype
        return load_policy(path, dtype=dtype, device=self.engine.device)

    def set_reference(self, logprobs: ReferenceLogprobs) -> None:
        """Put the reference's log-probabilities beside the pairs."""
        for name, pairs in self.splits.items():
            both = zip(pairs, logprobs[name], strict=True)
            self.splits[name] = [ReferencedPair(pair, *numbers) for pair, numbers in both]

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy completions as text. Collective: all ranks write the same, which keeps sharded weights in step."""
        answers, positions = [], positions_of(self.engine.module.config) or sys.maxsize
        for prompt in prompts:
            tokens_1T = torch.tensor([list(prompt)], device=self.engine.device)
            written = self.engine.module.generate(
                input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T), do_sample=False,
                max_new_tokens=max(1, min(max_new_tokens, positions - len(prompt))),
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=list(turn_end_ids(self.tokenizer)),
            )  # fmt: skip
            answers.append(written[0, len(prompt) :].tolist())
        return CompletionText(self.tokenizer).decode(answers)

    def export_model(self, folder: Path) -> None:
        """A plain Hugging Face folder with the tokenizer, which says what ends a turn. Collective."""
        self.engine.save_pretrained(folder, self.tokenizer, ends=turn_end_ids(self.tokenizer))

    def export_adapter(self, folder: Path) -> None:
        """What LoRA has learned, as a folder that PEFT reads, with the tokenizer. Collective."""
        self.engine.save_pretrained(folder, self.tokenizer, "adapter")

