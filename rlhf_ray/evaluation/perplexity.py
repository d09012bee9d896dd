"""Perplexity of a model on given texts: how much of the language it has kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_ray.errors import DataError

# [N] sequences of token ids -> the log-probability of each token; the first entry of a sequence says nothing.
Logprobs = Callable[[Sequence[Sequence[int]]], list[list[float]]]


@dataclass(frozen=True)
class Perplexity:
    """Sums over all texts. `nats` is the negative log-likelihood of the `tokens` that were scored."""

    nats: float
    tokens: int
    byte_count: int

    @property
    def per_token(self) -> float:
        """exp(nats a token): what people call perplexity. Comparable between models with one tokenizer only."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable whatever the tokenizers, but for the first token of each text, which is not scored."""
        return self.nats / math.log(2) / self.byte_count


@dataclass(frozen=True)
class Window:
    """`tokens` of text number `text`; the last `scored` of them count, those before are what the model sees."""

    text: int
    tokens: tuple[int, ...]
    scored: int


def windows_of(text: int, tokens: Sequence[int], size: int) -> list[Window]:
    """Cut one text so that no window holds more than `size` tokens and every token but the first counts once.

    Windows advance by half their size: each token of a long text is scored with at least size/2 tokens before it.
    The first token of the text is not scored, for nothing stands before it.
    """
    windows, end, stride = [], 1, max(1, size // 2)
    while end < len(tokens):
        stop = min(len(tokens), size if end == 1 else end + stride)
        windows.append(Window(text, tuple(tokens[max(0, stop - size) : stop]), stop - end))
        end = stop
    return windows


def measure_perplexity(
    logprobs: Logprobs, texts: Sequence[str], token_ids: Sequence[Sequence[int]], *, window: int, batch_size: int = 16
) -> Perplexity:
    """Perplexity of `texts`, whose tokens are `token_ids`, under `logprobs` (a generator's, at temperature 1).

    Raises DataError if no text has two tokens.
    """
    windows = [w for i, tokens in enumerate(token_ids) for w in windows_of(i, tokens, window)]
    if not windows:
        raise DataError("perplexity: no text has two tokens, so there is nothing to predict; give longer texts")
    # By length: a batch is padded to its longest row.
    ordered = sorted(windows, key=lambda w: len(w.tokens))
    nats = []
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        rows = logprobs([w.tokens for w in batch])
        nats += [-math.fsum(row[-w.scored :]) for w, row in zip(batch, rows, strict=True)]
    used = sorted({w.text for w in windows})
    return Perplexity(
        nats=math.fsum(nats),
        tokens=sum(w.scored for w in windows),
        byte_count=sum(len(texts[i].encode()) for i in used),
    )
