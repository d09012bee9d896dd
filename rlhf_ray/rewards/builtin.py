"""Built-in reward functions, in TRL's convention.

Each takes lists with one entry a row: `prompts`, `completions` (texts), `completion_ids` (token ids), and the
dataset's columns by name. Its own settings are keyword arguments with other names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from rlhf_ray.errors import ConfigError


def exact_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the completion, without surrounding blanks, is the row's `answer`; else 0."""
    return [float(text.strip() == str(right).strip()) for text, right in zip(completions, answer, strict=True)]


def sentiment(completions: Sequence[str], **_: Any) -> list[float]:
    """VADER's compound score of the completion: -1 (bad) to 1 (good), 0 where no word has a feeling.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
    """
    return [_vader().polarity_scores(text)["compound"] for text in completions]


def length_penalty(
    completion_ids: Sequence[Sequence[int]], *, free_tokens: int, per_token: float = 0.01, **_: Any
) -> list[float]:
    """Minus `per_token` for each token beyond the first `free_tokens`."""
    torch, shaping = _torch_and_shaping()
    return shaping.length_penalty(torch.tensor([len(ids) for ids in completion_ids]), free_tokens, per_token).tolist()


def repetition_penalty(completion_ids: Sequence[Sequence[int]], *, n: int = 2, **_: Any) -> list[float]:
    """Minus the share of n-grams of tokens that stood in the completion before: 0 (none) to almost -1."""
    _, shaping = _torch_and_shaping()
    return shaping.repetition_penalty(completion_ids, n).tolist()


def keyword(completions: Sequence[str], *, keywords: Sequence[str], **_: Any) -> list[float]:
    """The share of `keywords` that the completion holds as whole words; upper and lower case are the same."""
    if isinstance(keywords, str) or not keywords:
        raise ConfigError(f"reward keyword: keywords={keywords!r}; give a list of at least one word")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in keywords]
    return [sum(bool(p.search(text)) for p in patterns) / len(patterns) for text in completions]


def regex(completions: Sequence[str], *, pattern: str, **_: Any) -> list[float]:
    """1 where `pattern` matches the whole completion (a dot matches newlines too), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward regex: pattern={pattern!r} is not a regular expression ({error})") from error
    return [float(compiled.fullmatch(text) is not None) for text in completions]


def _torch_and_shaping() -> tuple[Any, Any]:
    # A reward server loads no torch unless a reward of its config needs it.
    import torch

    from rlhf_ray.algo import shaping

    return torch, shaping


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    # Reading its lexicon takes 50 ms: once, and only where it is used.
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
