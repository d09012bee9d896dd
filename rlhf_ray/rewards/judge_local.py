"""A judge that is a local causal language model: its verdict is read from probabilities, not from a generated text.

"A" or "B": whichever is more likely as the next token. A score: its expectation over the whole numbers of the scale,
each weighted with its probability (G-Eval; Liu et al., 2023, section 2.3). So no reply can be unreadable, and ties
come from the two orders only. It judges one text at a time and without reasons: for a large judge, or one that
thinks first, start a server and set `endpoint`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from datetime import datetime

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.errors import ModelError, RewardError
from rlhf_ray.models.devices import choose_hardware
from rlhf_ray.models.fits import positions_of
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.rewards.failures import Failure
from rlhf_ray.rewards.judge_questions import Message, Opinion, pair_messages, score_messages

Tokens = tuple[int, ...]


def load_local_judge(config: JudgeConfig) -> LocalJudge:
    """Raises RewardError if the model or its tokenizer cannot be loaded."""
    hardware = choose_hardware(config.device, config.dtype)
    try:
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        model = load_policy(
            config.model, dtype=hardware.dtype, device=hardware.device, trust_remote_code=config.trust_remote_code
        )
    except ModelError as error:
        raise RewardError(f"judge: {error}; for a model behind a server, set judge.endpoint") from error
    return LocalJudge(config, model, tokenizer)


class LocalJudge:
    """See `rewards.judge.Judge`. Settings of generation (temperature, max_tokens, attempts) do not apply."""

    def __init__(self, config: JudgeConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.moment = config.clock or datetime.now()
        self.positions = positions_of(model.config)
        self.keeps_last_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    async def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float | Failure]:
        low, high = self.config.scale
        numbers = list(range(low, high + 1))
        candidates = self._candidates([f" {number}" for number in numbers])
        scores: list[float | Failure] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            weights = self._probabilities(score_messages(self.config, prompt, completion), "Score:", candidates)
            if not isinstance(weights, Failure):
                weights = sum(w * n for w, n in zip(weights, numbers, strict=True)) / sum(weights)
            scores.append(weights)
        return scores

    async def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[Opinion | Failure]:
        candidates = self._candidates([" A", " B"])
        opinions: list[Opinion | Failure] = []
        for row in zip(prompts, a, b, strict=True):
            found = self._probabilities(pair_messages(self.config, *row), "Verdict:", candidates)
            if not isinstance(found, Failure):
                gap = math.log(found[0]) - math.log(found[1])
                found = Opinion("A" if gap > 0 else "B" if gap < 0 else "tie", gap)
            opinions.append(found)
        return opinions

    def _candidates(self, texts: Sequence[str]) -> list[Tokens]:
        candidates = [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if len(set(candidates)) < len(candidates) or not all(candidates):
            raise RewardError(
                f"judge {self.config.model}: its tokenizer cannot tell {', '.join(map(repr, texts))} apart, so it has "
                "no way to answer; choose another judge"
            )
        return candidates

    def _probabilities(
        self, messages: list[Message], opening: str, candidates: Sequence[Tokens]
    ) -> list[float] | Failure:
        """How likely the judge's reply goes on with each candidate after `opening`: with "1", that it is not "10"."""
        prompt = self._encode(messages, opening)
        starts = sorted({c[:i] for c in candidates for i in range(len(c))}, key=lambda start: (len(start), start))
        longest = len(prompt) + len(starts[-1])
        if self.positions is not None and longest > self.positions:
            return Failure(
                f"is too long for the judge ({longest} tokens, it reads {self.positions})",
                "lower max_new_tokens, or use a judge with a longer context",
            )
        logp_SV = self._next_logprobs(prompt, starts)
        row_of = {start: row for row, start in enumerate(starts)}

        def likelihood(tokens: Tokens) -> float:
            return math.exp(sum(float(logp_SV[row_of[tokens[:i]], tokens[i]]) for i in range(len(tokens))))

        whole = {c: likelihood(c) for c in candidates}
        tiny = math.ulp(0.0)  # of a candidate that the judge rules out: its logarithm must exist
        return [
            max(tiny, p - sum(q for other, q in whole.items() if len(other) > len(c) and other[: len(c)] == c))
            for c, p in whole.items()
        ]

    def _encode(self, messages: list[Message], opening: str) -> list[int]:
        """The judge's prompt, up to where its verdict stands."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=self.moment.strftime
            )
            # The template has written its special tokens already.
            return self.tokenizer(text + opening, add_special_tokens=False)["input_ids"]
        text = "\n\n".join(message["content"] for message in messages)
        return self.tokenizer(f"{text}\n\n{opening}")["input_ids"]

    @torch.no_grad()
    def _next_logprobs(self, prompt: Sequence[int], starts: Sequence[Tokens]) -> torch.Tensor:
        """[S, V] log-probabilities of the token after `prompt + start`, on the CPU in float64."""
        rows = [[*prompt, *start] for start in starts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        # Logits of a whole prompt over a large vocabulary are gigabytes; only those of its end are wanted.
        keep = width - len(prompt) + 1
        options = {"logits_to_keep": keep} if self.keeps_last_logits else {}
        logits = self.model(input_ids=tokens, attention_mask=mask, **options).logits[:, -keep:]
        last = torch.tensor([len(start) for start in starts], device=logits.device)
        picked_SV = logits[torch.arange(len(starts), device=logits.device), last]
        return picked_SV.float().cpu().double().log_softmax(-1)  # MPS has no float64
