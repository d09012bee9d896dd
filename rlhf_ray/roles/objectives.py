"""What a supervised run learns: language modelling, preferences for a reward model, and labels.

Preferences for a policy are in `preferences.py`.

An objective makes items into a batch, the model's outputs into one loss an item (`measure`), and what was measured
of any number of items into metrics. Training and validation use the same three, so a number means the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf_ray.algo.calibration import calibration_error, correlation, histogram, preference_confidence
from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.algo.preference import bradley_terry_loss
from rlhf_ray.data.examples import LabelledText, TokenizedExample, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Measured = dict[str, Tensor]  # one number an item, by name; "loss" carries the gradient


@dataclass(frozen=True)
class SupervisedBatch:
    """Rows padded on the right. Of P pairs, rows 0..P-1 are the chosen answers and P..2P-1 the rejected ones."""

    tokens: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool
    learned: Tensor  # [B, T] bool: tokens of the answer; all False where the objective looks at whole texts
    extra: Mapping[str, Tensor]  # [items]: margin, label, reference log-probabilities, ...

    def to(self, device: torch.device) -> SupervisedBatch:
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        return SupervisedBatch(
            self.tokens.to(device), self.attention_mask.to(device), self.learned.to(device), extra
        )

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of the answer in each row."""
        return self.learned.sum(1)


class Objective(Protocol, Generic[Item]):
    def lengths(self, item: Item) -> tuple[int, ...]:
        """Tokens of each row that the item makes."""

    def weight(self, item: Item) -> int:
        """The item's share in the denominator of the mean loss."""

    def collate(self, items: Sequence[Item]) -> SupervisedBatch: ...

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        """The loss of each item, summed over what `weight` counts, and whatever `metrics` and `report` need."""

    def metrics(self, measured: Measured) -> dict[str, float]:
        """Metrics of a step, by their final names."""

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics, details such as histograms) of an evaluation."""


class SFT:
    """Cross-entropy of the learned tokens, in nats a token.

    `ignored_token` is read but never learned: a model that has learned `<unk>` writes it.
    """

    def __init__(self, pad_token_id: int, ignored_token: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.ignored_token = ignored_token

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SFT:
        """Without `<unk>`, unless the tokenizer uses one token for that and for the end (as GPT-2's does)."""
        unknown = tokenizer.unk_token_id
        return cls(tokenizer.pad_token_id, None if unknown == tokenizer.eos_token_id else unknown)

    def lengths(self, item: TokenizedExample) -> tuple[int, ...]:
        return (len(item.token_ids),)

    def weight(self, item: TokenizedExample) -> int:
        # Nothing predicts the first token of a row.
        tokens = zip(item.token_ids[1:], item.learned[1:], strict=True)
        return sum(learned and token != self.ignored_token for token, learned in tokens)

    def collate(self, items: Sequence[TokenizedExample]) -> SupervisedBatch:
        batch = pad_examples(items, self.pad_token_id)
        if self.ignored_token is not None:
            batch.learned.logical_and_(batch.tokens != self.ignored_token)
        return batch

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        return language_model_inputs(batch)

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        learned_BT = batch.learned[:, 1:]
        greedy_BT = outputs.logits.detach()[:, :-1].argmax(-1) == batch.tokens[:, 1:]
        return {
            "loss": -token_logprobs(outputs.logits, batch.tokens, mask_BT=batch.learned).sum(1),
            "weight": learned_BT.sum(1),
            "right": (greedy_BT & learned_BT).sum(1),
        }

    def metrics(self, measured: Measured) -> dict[str, float]:
        weight = measured["weight"].sum().clamp(min=1)
        loss = float(measured["loss"].sum() / weight)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            # Of the learned tokens, and of the answers: what greedy decoding would have written.
            "token_accuracy": float(measured["right"].sum() / weight),
            "exact_accuracy": float((measured["right"] == measured["weight"]).double().mean()),
        }

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        return self.metrics(measured), {}


class Pair(Protocol):
    """Two answers to one prompt, each a whole sequence."""

    @property
    def chosen(self) -> TokenizedExample: ...
    @property
    def rejected(self) -> TokenizedExample: ...


class PairObjective:
    """What all that learns from pairs shares: of P pairs, rows 0..P-1 are the chosen answers, P..2P-1 the rejected."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def lengths(self, item: Pair) -> tuple[int, ...]:
        return len(item.chosen.token_ids), len(item.rejected.token_ids)

    def weight(self, item: Pair) -> int:
        return 1

    def collate(self, items: Sequence[Any]) -> SupervisedBatch:
        rows = [item.chosen for item in items] + [item.rejected for item in items]
        return pad_examples(rows, self.pad_token_id, **self.extra(items))

    def extra(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """[P] numbers of the pairs, by name."""
        return {}


class BradleyTerry(PairObjective):
    """Reward-model loss on pairs: -log sigmoid(r_chosen - r_rejected - margin), r from a classifier with one label.

    Its items are as a reward model reads them (`Encoder.as_judged`), so the score is learned where it will be read.
    """

    def __init__(self, pad_token_id: int, margin_scale: float = 1.0) -> None:
        super().__init__(pad_token_id)
        self.margin_scale = margin_scale

    def extra(self, items: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        margins = [self.margin_scale * item.margin for item in items]
        return {"margin": torch.tensor(margins, dtype=torch.float32)}

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        return classifier_inputs(batch)

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        chosen_P, rejected_P = outputs.logits[:, 0].float().chunk(2)
        chosen_length_P, rejected_length_P = batch.lengths.chunk(2)
        return {
            "loss": bradley_terry_loss(chosen_P, rejected_P, batch.extra["margin"]),
            "chosen": chosen_P.detach(), "rejected": rejected_P.detach(),
            "chosen_length": chosen_length_P, "rejected_length": rejected_length_P,
        }  # fmt: skip

    def metrics(self, measured: Measured) -> dict[str, float]:
        chosen_N, rejected_N = measured["chosen"], measured["rejected"]
        scores = torch.cat([chosen_N, rejected_N])
        return {
            "loss": float(measured["loss"].mean()),
            "accuracy": float((chosen_N > rejected_N).double().mean()),
            "margin": float((chosen_N - rejected_N).mean()),
            "mean_reward": float(scores.mean()),
            "min_reward": float(scores.min()),
            "max_reward": float(scores.max()),
        }

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        scores = torch.cat([measured["chosen"], measured["rejected"]])
        lengths = torch.cat([measured["chosen_length"], measured["rejected_length"]])
        confidence_N, correct_N = preference_confidence(measured["chosen"] - measured["rejected"])
        numbers = {
            "ece": calibration_error(confidence_N, correct_N),
            "length_correlation": correlation(scores, lengths),
        }
        edges, (chosen, rejected) = histogram([measured["chosen"], measured["rejected"]])
        details = {"score_histogram": {"edges": edges, "chosen": chosen, "rejected": rejected}}
        return {**self.metrics(measured), **numbers}, details


class Classification:
    """Cross-entropy over labels."""

    def __init__(self, pad_token_id: int, labels: Sequence[str]) -> None:
        self.pad_token_id = pad_token_id
        self.labels = tuple(labels)

    def lengths(self, item: LabelledText) -> tuple[int, ...]:
        return (len(item.token_ids),)

    def weight(self, item: LabelledText) -> int:
        return 1

    def collate(self, items: Sequence[LabelledText]) -> SupervisedBatch:
        label_B = torch.tensor([item.label for item in items])
        return pad_rows([item.token_ids for item in items], self.pad_token_id, label=label_B)

    def inputs(self, batch: SupervisedBatch) -> dict[str, Any]:
        return classifier_inputs(batch)

    def measure(self, outputs: Any, batch: SupervisedBatch) -> Measured:
        logits_BC, label_B = outputs.logits.float(), batch.extra["label"]
        confidence_B, guess_B = logits_BC.detach().softmax(-1).max(-1)
        return {
            "loss": cross_entropy(logits_BC, label_B, reduction="none"),
            "correct": (guess_B == label_B).float(), "confidence": confidence_B, "label": label_B,
        }  # fmt: skip

    def metrics(self, measured: Measured) -> dict[str, float]:
        return {"loss": float(measured["loss"].mean()), "accuracy": float(measured["correct"].mean())}

    def report(self, measured: Measured) -> tuple[dict[str, float], dict[str, Any]]:
        numbers = {"ece": calibration_error(measured["confidence"], measured["correct"])}
        recall = {
            name: float(measured["correct"][measured["label"] == index].mean())
            for index, name in enumerate(self.labels)
            if bool((measured["label"] == index).any())
        }
        return {**self.metrics(measured), **numbers}, {"accuracy_by_label": recall}


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, learned: Sequence[Sequence[bool]] | None = None, **extra: Tensor
) -> SupervisedBatch:
    """Rows of token ids, side by side. The pad id matters: a decoder's classifier looks for the last other token."""
    tokens_BT = torch.full((len(rows), max(map(len, rows))), pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    learned_BT = torch.zeros_like(mask_BT)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)
        mask_BT[index, : len(row)] = True
        if learned is not None:
            learned_BT[index, : len(row)] = torch.tensor(learned[index])
    return SupervisedBatch(tokens_BT, mask_BT, learned_BT, extra)


def pad_examples(examples: Sequence[TokenizedExample], pad_token_id: int, **extra: Tensor) -> SupervisedBatch:
    """`pad_rows` of sequences that say which of their tokens are learned."""
    return pad_rows([row.token_ids for row in examples], pad_token_id, [row.learned for row in examples], **extra)


def classifier_inputs(batch: SupervisedBatch) -> dict[str, Any]:
    # Rows are padded on the right, so positions 0..T-1 are right without position_ids.
    return {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long()}


def language_model_inputs(batch: SupervisedBatch) -> dict[str, Any]:
    return {**classifier_inputs(batch), "use_cache": False}
