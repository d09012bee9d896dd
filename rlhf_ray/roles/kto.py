"""KTO: a policy learns from single answers that are good or bad, against a reference (Ethayarajh et al. 2024).

Its loss wants an estimate of KL(policy || reference), and takes it from the batch: each prompt with the answer to
another one. So what one answer costs depends on the whole optimiser step, over all micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_ray.algo.preference import kto_loss
from rlhf_ray.config.supervised import DPOLossConfig
from rlhf_ray.data.examples import LabelledAnswer, TokenizedExample
from rlhf_ray.roles.objectives import Measured, SupervisedBatch, language_model_inputs, pad_examples
from rlhf_ray.roles.preferences import answer_logprobs
from rlhf_ray.roles.supervised import ReferenceLogprobs, SupervisedTrainer

# More shifts of a batch are not tried: the first few find other prompts, unless nearly all rows ask the same.
MOST_SHIFTS = 64


@dataclass(frozen=True)
class KTOItem:
    """An answer, where it lies in its split, and what is known of it and of the batch that it is in."""

    example: LabelledAnswer
    split: str
    place: int
    reference_logp: float = 0.0  # under the reference policy, summed over the answer's tokens
    kl: float = 0.0  # nats an answer, of the whole batch

    @property
    def source(self) -> str:
        return self.example.source

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.example.token_ids[: _start(self.example)]


class KTO:
    """`kto_loss` of each answer. Its items are `KTOItem`."""

    def __init__(self, pad_token_id: int, config: DPOLossConfig) -> None:
        self.pad_token_id = pad_token_id
        self.config = config

    def lengths(self, item: KTOItem) -> tuple[int, ...]:
        return (len(item.example.token_ids),)

    def weight(self, item: KTOItem) -> int:
        return 1

    def collate(self, items: Sequence[KTOItem]) -> SupervisedBatch:
        return pad_examples(
            [item.example for item in items], self.pad_token_id,
            good=torch.tensor([item.example.good for item in items]),
            reference=torch.tensor([item.reference_logp for item in items], dtype=torch.float32),
            kl=torch.tensor([item.kl for item in items], dtype=torch.float32),
        )  # fmt: skip

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        return language_model_inputs(batch)

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        logp_B, extra = answer_logprobs(outputs, batch), batch.extra
        loss_B, reward_B = kto_loss(
            logp_B, extra["reference"], extra["good"], extra["kl"], self.config.beta,
            desirable_weight=self.config.desirable_weight, undesirable_weight=self.config.undesirable_weight,
        )  # fmt: skip
        return {
            "loss": loss_B, "reward": reward_B, "logp": logp_B.detach(), "good": extra["good"],
            "kl": extra["kl"].clamp(min=0.0),
        }  # fmt: skip

    def metrics(self, measured: Measured) -> dict[str, float]:
        """By the names that TRL gives them; a batch may lack answers of one kind, and then what is about them."""
        good_N = measured["good"] > 0
        metrics = {"loss": float(measured["loss"].mean()), "kl": float(measured["kl"].mean())}
        for name, kind_N in (("chosen", good_N), ("rejected", ~good_N)):
            if bool(kind_N.any()):
                metrics[f"rewards/{name}"] = float(measured["reward"][kind_N].mean())
                metrics[f"logps/{name}"] = float(measured["logp"][kind_N].mean())
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        return self.metrics(measured), {}


class KTOTrainer(SupervisedTrainer):
    """A trainer whose items are told the KL of the batch that they are in before they are measured.

    `reference_logprobs` gives triples (a, p, log-probability of the answer of row a after the prompt of row p), for all
    that the run will ask: of every row itself, and of the mismatched ones of every batch and evaluation.
    """

    def __init__(self, *args: Any, max_length: int, **options: Any) -> None:
        """`max_length`: a long prompt and another prompt's long answer are cut there."""
        super().__init__(*args, **options)
        self.max_length = max_length
        self.splits = {
            name: [KTOItem(example, name, place) for place, example in enumerate(examples)]
            for name, examples in self.splits.items()
        }
        self._reference: dict[str, dict[tuple[int, int], float]] = {}

    def ready(self, items: list[KTOItem]) -> list[KTOItem]:
        reference = self._reference[items[0].split]
        pairs = mismatched(items)
        logps = self.logprobs([(self._joined(*pair),) for pair in pairs])
        ratios = [
            logp - reference[answer.place, prompt.place] for (logp,), (answer, prompt) in zip(logps, pairs, strict=True)
        ]
        kl = sum(ratios) / len(ratios)
        return [replace(item, reference_logp=reference[item.place, item.place], kl=kl) for item in items]

    def reference_logprobs(
        self, path: str | None = None, batches: Sequence[Sequence[int]] = (), sample: int | None = None
    ) -> ReferenceLogprobs:
        """See the class. `batches`: the rows of `train` that the steps will take; `sample`: how many of `train` are
        evaluated. Every other split is evaluated whole. `path`: see the base. Collective.
        """
        model, found = self.reference_model(path), {}
        for name, items in self.splits.items():
            whole = [list(self.places(name, sample if name == "train" else None))]
            asked = {(place, place): None for place in range(len(items))}
            for places in [*batches, *whole] if name == "train" else whole:
                pairs = mismatched([items[place] for place in places])
                asked.update(dict.fromkeys((answer.place, prompt.place) for answer, prompt in pairs))
            logps = self.logprobs([(self._joined(items[a], items[p]),) for a, p in asked], model)
            found[name] = [(a, p, logp) for (a, p), (logp,) in zip(asked, logps, strict=True)]
        return found

    def set_reference(self, logprobs: ReferenceLogprobs) -> None:
        self._reference = {
            name: {(int(answer), int(prompt)): logp for answer, prompt, logp in logprobs[name]} for name in self.splits
        }

    def _joined(self, answer: KTOItem, prompt: KTOItem) -> TokenizedExample:
        """The answer of one row after the prompt of another."""
        if answer.place == prompt.place:
            return answer.example
        start, before = _start(answer.example), prompt.prompt
        ids = (*before, *answer.example.token_ids[start:])
        learned = (*(False for _ in before), *answer.example.learned[start:])
        return TokenizedExample(ids[: self.max_length], learned[: self.max_length])


def mismatched(items: Sequence[KTOItem]) -> list[tuple[KTOItem, KTOItem]]:
    """(row whose answer it is, row whose prompt it is) for each prompt: the answer of the row before it, round the end.

    As in TRL, but for rows that ask the same: there the answers come from so many rows before that none meets its own
    prompt, or as few as can be. The answers are those of the batch, each once.
    """
    prompts = [item.prompt for item in items]

    def met(shift: int) -> int:
        return sum(prompts[place] == prompts[place - shift] for place in range(len(items)))

    shifts = range(1, min(len(items), MOST_SHIFTS + 1))
    shift = next((shift for shift in shifts if met(shift) == 0), None)
    if shift is None:
        shift = min(shifts, key=met, default=0)
    return [(items[place - shift], items[place]) for place in range(len(items))]


def _start(example: TokenizedExample) -> int:
    """Where the answer begins: at the first learned token."""
    return example.learned.index(True)
