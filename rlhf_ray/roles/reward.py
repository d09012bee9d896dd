"""The judge of completions: reward functions and, where there are such, a reward model and a safety classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.rewards import RewardModelConfig
from rlhf_ray.data.completion_text import CompletionText
from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.classifier import Classifier, Safety, TextScores
from rlhf_ray.rewards.compose import RewardSet
from rlhf_ray.rewards.reading import Answered, Reader
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_ray.models.sharded import Sharded


class RewardModel:
    """A sequence classifier that scores answers: its tokenizer and its chat template may differ from the policy's.

    `policy`: the tokenizer of whoever wrote the answers. `clock`: what the chat template takes for now. `sharded`: see
    `Classifier`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardModelConfig,
        *,
        policy: PreTrainedTokenizerBase | None = None,
        clock: datetime | None = None,
        sharded: Sharded | None = None,
    ) -> None:
        self.config = config
        self.classifier = Classifier(model, tokenizer, config.path, sharded)
        self.reader = Reader(tokenizer, scores_pairs=model.config.num_labels == 1, policy=policy, clock=clock)

    def score(self, answers: Sequence[Answered | str]) -> TextScores:
        """One number an answer, or text; of the only label, or of the last one; `config.output` says which.

        A text longer than the limit (`config.max_length`, or less if the model reads less) loses its beginning.
        """
        config = self.config
        last = self.classifier.index_of(None)
        texts = [self.reader.read(answered) for answered in answers]
        return self.classifier.score(texts, last, config.output, config.max_length, config.batch_size)


class Reward:
    """Decodes completions and adds up the weighted rewards."""

    def __init__(
        self,
        functions: RewardSet,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: RewardModel | None = None,
        safety: Safety | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        """`stop`: ids that end an answer, no part of its text, beside the EOS and the template's end of turn."""
        self.functions = functions
        self.text = CompletionText(tokenizer, stop)
        self.model = model
        self.safety = safety

    def score(self, batch: Batch, texts: int = 0, first: int = 0) -> Scores:
        """Reward of each row, and the decoded text of the first `texts` rows. `first`: see `roles.protocols.Reward`.

        Raises RewardError if the model gives no finite number for a row, or a function whose policy is to raise.
        """
        ids = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.response_mask, strict=True)]
        completions = self.text.decode(ids)
        prompts = [row["prompt"] for row in batch.columns]
        reads_wholes = self.model is not None or self.safety is not None
        answered = self._answered(batch, prompts, completions) if reads_wholes else ()
        scores = self.score_texts(prompts, completions, ids, batch.columns, answered, batch.prompt_id.tolist(), first)
        return replace(scores, texts=scores.texts[:texts], completion_ids=tuple(map(tuple, ids[:texts])))

    def score_texts(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Sequence[Mapping[str, Any]],
        answered: Sequence[Answered],
        groups: Sequence[int],
        first: int = 0,
    ) -> Scores:
        """As `score`, of texts. `answered`: what networks judge; equal `groups` answer the same prompt."""
        networks = self.model is not None or self.safety is not None
        rewards = self.functions.score(
            prompts, completions, completion_ids, columns, groups, others_judge=networks, first=first
        )
        score_B = torch.tensor(rewards.total, dtype=torch.float32)
        named = {name: torch.tensor(values, dtype=torch.float32) for name, values in rewards.by_function.items()}
        stats = dict(rewards.stats)
        if self.model is not None:
            weight = self.model.config.weight
            named["reward_model"] = _judged("reward_model", self.model, weight, answered, stats, first)
            score_B = score_B + weight * named["reward_model"]
        if self.safety is not None:
            weight = self.safety.config.weight
            named["safety"] = _judged("safety", self.safety, weight, answered, stats, first)
            score_B = (1 - weight) * score_B + weight * named["safety"]
        keep_B = None if all(rewards.keep) else torch.tensor(rewards.keep)
        texts = tuple(zip(prompts, completions, strict=True))
        return Scores(score_B, named, texts, keep_B, stats, tuple(rewards.events))

    def _answered(self, batch: Batch, prompts: Sequence[str], completions: Sequence[str]) -> list[Answered]:
        """Each prompt as it was given, with a chat template's special tokens, and its completion behind it."""
        finished = (~batch.truncated).tolist()
        rows = zip(batch.tokens, batch.attention_mask, batch.response_mask, strict=True)
        answered = []
        for i, (row, mask, response) in enumerate(rows):
            behind = self.text.decode_behind(row[mask & ~response].tolist(), row[response].tolist())
            answer = completions[i] if behind is None else behind
            ids = tuple(row[mask].tolist())
            answered.append(Answered(prompts[i], answer, batch.chats[i], completions[i], ids, finished[i]))
        return answered


def _judged(
    name: str, judge: RewardModel | Safety, weight: float, answered: Sequence[Answered], stats: dict[str, float],
    first: int,
) -> torch.Tensor:  # fmt: skip
    """Its scores, none too large also with its weight; `stats` learns how many texts were too long for it."""
    try:
        values, cut = judge.score(answered)
    except RewardError as error:
        raise RewardError(f"{name}: {error} ({judge.config.path})") from error
    score_B = torch.tensor(values)
    # Scores that are not finite compare false too.
    fine_B = score_B.abs() * max(1.0, abs(weight)) <= LARGEST_REWARD
    if not fine_B.all():
        row = int((~fine_B).nonzero()[0])
        hint = f"check the folder {judge.config.path}"
        if score_B[row].isfinite():
            hint += f", or lower its weight ({weight:g}): rewards end at {LARGEST_REWARD:g}"
        raise RewardError(f"{name}: row {first + row} scored {score_B[row]:g}; {hint}")
    stats[f"reward/{name}_cut"] = float(cut)
    return score_B
