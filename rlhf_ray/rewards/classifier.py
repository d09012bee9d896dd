"""Sequence classifiers as judges of texts: the reward function `classifier`, the reward model, the safety share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.config.rewards import SafetyConfig
from rlhf_ray.data.encoding import without_bos
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.fits import positions_of
from rlhf_ray.models.loading import load_reward_model
from rlhf_ray.rewards.reading import Answered, Reader

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_ray.models.sharded import Sharded

Output = Literal["prob", "logprob", "logit"]


class TextScores(NamedTuple):
    values: list[float]
    cut: int  # texts that were too long, so that their beginning was not read


def classifier(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    path: str,
    label: str | None = None,
    output: Output = "prob",
    whole: bool = False,
    max_length: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    **_: Any,
) -> list[float]:
    """How sure the classifier in `path` (a folder or Hub name) is of `label`; default: its last one.

    Args:
        whole: judge prompt and completion together, not the completion alone.
        output: a probability p, its logarithm, or its logit log(p / (1 - p)).
        max_length: in tokens; of a longer text the end is judged. Empty: as much as the model reads.
    """
    if output not in ("prob", "logprob", "logit"):
        raise ConfigError(f"reward classifier: output={output!r}; it is prob, logprob or logit")
    model = load_classifier(path, device)
    texts = [a + b for a, b in zip(prompts, completions, strict=True)] if whole else list(completions)
    return model.score(texts, model.index_of(label), output, max_length, batch_size).values


class Classifier:
    """Scores whole texts, as many at a time as a batch holds, whatever their neighbours."""

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, sharded: Sharded | None = None
    ) -> None:
        """`sharded`: where several ranks hold `network` together, what computes in its place; `score` is collective,
        and all ranks are given the same texts."""
        self.network = network.eval().requires_grad_(False)
        self.sharded = sharded
        self.tokenizer = tokenizer
        self.path = path
        # A decoder's tokenizer pads on the left for generation; there, absolute positions (GPT-2) would shift with
        # the padding and a text's score with its neighbours.
        tokenizer.padding_side = "right"
        # The answer stands at the end: of a text that is too long, that is the part to judge.
        tokenizer.truncation_side = "left"

    def index_of(self, label: str | None) -> int:
        """Of a label, or of the last one. Raises ConfigError, naming the labels there are."""
        if label is None:
            return self.network.config.num_labels - 1
        labels = {str(name).lower(): int(index) for name, index in self.network.config.label2id.items()}
        if label.lower() not in labels:
            raise ConfigError(f"{self.path} has no label {label!r}; its labels are {', '.join(labels)}")
        return labels[label.lower()]

    @torch.no_grad()
    def score(
        self,
        texts: Sequence[str | tuple[int, ...]],
        index: int,
        output: Output,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> TextScores:
        """Of the label at `index`, for each text or its token ids; `max_length` in tokens, or less if the model reads
        less."""
        limit = min(max_length or sys.maxsize, self.tokenizer.model_max_length, _positions(self.network))
        parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        compute = functools.partial(self._score_batch, index=index, output=output, limit=limit)
        found = self.sharded.map(compute, parts) if self.sharded else list(map(compute, parts))
        return TextScores([value for part in found for value in part.values], sum(part.cut for part in found))

    def _score_batch(
        self, texts: Sequence[str | tuple[int, ...]], *, index: int, output: Output, limit: int
    ) -> TextScores:
        encoded, cut = self._encoded(texts, limit)
        forward = self.sharded or self.network
        inputs = {name: encoded[name].to(forward.device) for name in ("input_ids", "attention_mask")}
        logit_B = self._logits(forward(**inputs).logits.float(), index)
        if output == "logit":
            return TextScores(logit_B.tolist(), cut)
        return TextScores((logsigmoid(logit_B) if output == "logprob" else logit_B.sigmoid()).tolist(), cut)

    def _encoded(self, texts: Sequence[str | tuple[int, ...]], limit: int) -> tuple[BatchEncoding, int]:
        """(a padded batch, how many texts were too long)."""
        plain = [text if isinstance(text, tuple) else without_bos(text, self.tokenizer) for text in texts]
        if all(isinstance(text, str) for text in plain):
            encoded = self.tokenizer(plain, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            return encoded, self._count_cut(plain, encoded, limit)
        rows = [list(text) if isinstance(text, tuple) else self.tokenizer(text)["input_ids"] for text in plain]
        fitting = [self._end_of(ids, limit) for ids in rows]
        cut = sum(len(ids) > limit for ids in rows)
        return self.tokenizer.pad({"input_ids": fitting}, padding=True, return_tensors="pt"), cut

    def _end_of(self, ids: list[int], limit: int) -> list[int]:
        """The last tokens, behind BOS where there is one."""
        begins = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        return ids if len(ids) <= limit else [*begins, *ids[len(ids) - limit + len(begins) :]]

    def _count_cut(self, texts: Sequence[str], encoded: BatchEncoding, limit: int) -> int:
        if encoded.encodings is not None:
            return sum(bool(row.overflowing) for row in encoded.encodings)
        return sum(len(ids) > limit for ids in self.tokenizer(list(texts))["input_ids"])  # a slow tokenizer

    def _logits(self, raw_BC: Tensor, index: int) -> Tensor:
        """log(p / (1 - p)) of one label. Labels exclude each other, unless the model says that they do not."""
        if raw_BC.shape[1] == 1 or self.network.config.problem_type == "multi_label_classification":
            return raw_BC[:, index]
        others = [label for label in range(raw_BC.shape[1]) if label != index]
        return raw_BC[:, index] - raw_BC[:, others].logsumexp(-1)


class Safety:
    """How safe texts are, for `(1 - weight) * quality + weight * safety`."""

    def __init__(
        self,
        config: SafetyConfig,
        device: str = "cpu",
        *,
        policy: PreTrainedTokenizerBase | None = None,
        clock: datetime | None = None,
        model: Classifier | None = None,
    ) -> None:
        """`model`: where it has been loaded already. Raises ConfigError or ModelError."""
        self.config = config
        self.model = model or load_classifier(config.path, device)
        self.index = self.model.index_of(config.safe_label or config.unsafe_label)
        self.reader = Reader(self.model.tokenizer, scores_pairs=False, policy=policy, clock=clock)

    def score(self, answers: Sequence[Answered | str]) -> TextScores:
        """Probability that each answer, or text, is safe."""
        texts = [self.reader.read(answered) for answered in answers]
        values, cut = self.model.score(texts, self.index, "prob", self.config.max_length, self.config.batch_size)
        return TextScores([1.0 - value for value in values] if self.config.unsafe_label else values, cut)


@functools.lru_cache(maxsize=4)
def load_classifier(path: str, device: str = "cpu") -> Classifier:
    """Raises ModelError if there is none."""
    return Classifier(*load_reward_model(path, device=device), path)


def _positions(network: PreTrainedModel) -> int:
    """That a text may take; without a table of positions there is no bound."""
    positions = positions_of(network.config)
    if positions is None:
        return sys.maxsize
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa counts from behind the padding's
    return positions
