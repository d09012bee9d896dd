"""A Hugging Face sequence classifier as a reward: sentiment, safety, style."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_ray.config.schema import SafetyConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_reward_model


def classifier(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    path: str,
    label: str | None = None,
    output: Literal["prob", "logprob", "logit"] = "prob",
    whole: bool = False,
    max_length: int = 512,
    batch_size: int = 64,
    device: str = "cpu",
    **_: Any,
) -> list[float]:
    """How sure the classifier in `path` (a folder or Hub name) is of `label`; default: its last one.

    Args:
        whole: judge prompt and completion together, not the completion alone.
        output: a probability, its logarithm, or the label's raw output.
    """
    if output not in ("prob", "logprob", "logit"):
        raise ConfigError(f"reward classifier: output={output!r}; it is prob, logprob or logit")
    model = load_classifier(path, device)
    texts = [a + b for a, b in zip(prompts, completions, strict=True)] if whole else list(completions)
    index = model.index_of(label)
    parts = [
        model.scores(texts[start : start + batch_size], index, output, max_length)
        for start in range(0, len(texts), batch_size)
    ]
    return [score for part in parts for score in part]


@dataclass(frozen=True)
class Classifier:
    network: Any
    tokenizer: Any
    path: str

    def index_of(self, label: str | None) -> int:
        """Raises ConfigError, naming the labels there are."""
        labels = {str(name).lower(): int(index) for name, index in self.network.config.label2id.items()}
        if label is None:
            return self.network.config.num_labels - 1
        if label.lower() not in labels:
            raise ConfigError(f"{self.path} has no label {label!r}; its labels are {', '.join(labels)}")
        return labels[label.lower()]

    @torch.no_grad()
    def scores(self, texts: Sequence[str], index: int, output: str, max_length: int) -> list[float]:
        """Of the label at `index`. Labels exclude each other, unless the model says that they do not."""
        limit = min(max_length, self.tokenizer.model_max_length, _longest(self.network))
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = {name: encoded[name].to(self.network.device) for name in ("input_ids", "attention_mask")}
        logits_BC = self.network(**inputs).logits.float()
        if output == "logit":
            return logits_BC[:, index].tolist()
        alone = logits_BC.shape[1] == 1 or self.network.config.problem_type == "multi_label_classification"
        logprob_BC = torch.nn.functional.logsigmoid(logits_BC) if alone else logits_BC.log_softmax(-1)
        return (logprob_BC if output == "logprob" else logprob_BC.exp())[:, index].tolist()


class Safety:
    """How safe texts are, for `(1 - weight) * quality + weight * safety`."""

    def __init__(self, config: SafetyConfig, device: str = "cpu") -> None:
        """Raises ConfigError or ModelError."""
        self.config = config
        self.model = load_classifier(config.path, device)
        self.index = self.model.index_of(config.safe_label or config.unsafe_label)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Probability that each text is safe."""
        size, scores = self.config.batch_size, []
        for start in range(0, len(texts), size):
            scores += self.model.scores(texts[start : start + size], self.index, "prob", self.config.max_length)
        return [1.0 - score for score in scores] if self.config.unsafe_label else scores


@functools.lru_cache(maxsize=4)
def load_classifier(path: str, device: str = "cpu") -> Classifier:
    """Raises ModelError if there is none."""
    network, tokenizer = load_reward_model(path, device=device)
    # Padding on the left would shift absolute positions; of a text that is too long the end is what counts.
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return Classifier(network.requires_grad_(False), tokenizer, path)


def _longest(network: Any) -> int:
    """Positions that the model has; without a table of positions there is no bound."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
