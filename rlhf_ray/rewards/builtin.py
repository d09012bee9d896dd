"""Built-in reward functions, in TRL's convention.

Each takes lists with one entry a row: `prompts`, `completions` (texts), `completion_ids` (token ids), and the
dataset's columns by name. Its own settings are keyword arguments with other names.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from rlhf_ray.data.words import Chinese, is_latin, occurs, segments
from rlhf_ray.errors import ConfigError

Unit = Literal["tokens", "words"]


def exact_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the completion, without surrounding blanks, is the row's `answer`; else 0."""
    return [float(text.strip() == str(right).strip()) for text, right in zip(completions, answer, strict=True)]


def sentiment(completions: Sequence[str], **_: Any) -> list[float]:
    """VADER's compound score of the completion: -1 (bad) to 1 (good), 0 where no word has a feeling. Its words are
    English: texts in other scripts score 0, which a warning says.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
    """
    if not is_latin(" ".join(completions)):
        _warn_of_other_scripts()
    return [_vader().polarity_scores(text)["compound"] for text in completions]


def length_penalty(
    completion_ids: Sequence[Sequence[int]],
    completions: Sequence[str] = (),
    *,
    free_tokens: int,
    per_token: float = 0.01,
    unit: Unit = "tokens",
    chinese: Chinese = "characters",
    **_: Any,
) -> list[float]:
    """Minus `per_token` for each token (with `unit="words"`: word or character) beyond the first `free_tokens`."""
    torch, shaping = _torch_and_shaping()
    lengths = [len(items) for items in _units(completion_ids, completions, unit, chinese)]
    return shaping.length_penalty(torch.tensor(lengths), free_tokens, per_token).tolist()


def repetition_penalty(
    completion_ids: Sequence[Sequence[int]],
    completions: Sequence[str] = (),
    *,
    n: int = 2,
    unit: Unit = "tokens",
    chinese: Chinese = "characters",
    **_: Any,
) -> list[float]:
    """Minus the share of n-grams of tokens (with `unit="words"`: words or characters) that stood in the completion
    before: 0 (none) to almost -1.
    """
    _, shaping = _torch_and_shaping()
    return shaping.repetition_penalty(_units(completion_ids, completions, unit, chinese), n).tolist()


def _units(
    completion_ids: Sequence[Sequence[int]], completions: Sequence[str], unit: str, chinese: Chinese
) -> Sequence[Sequence[Hashable]]:
    if unit not in ("tokens", "words"):
        raise ConfigError(f"reward length_penalty or repetition_penalty: unit={unit!r}; choose tokens or words")
    # Different Chinese characters may begin with the same token of a byte-level tokenizer: a repetition that is none.
    return completion_ids if unit == "tokens" else [segments(text, chinese=chinese) for text in completions]


def keyword(
    completions: Sequence[str], *, keywords: Sequence[str], chinese: Chinese = "characters", **_: Any
) -> list[float]:
    """The share of `keywords` that the completion holds as whole words (in scripts without blanks: anywhere); upper and
    lower case, full and half width are the same.
    """
    if isinstance(keywords, str) or not keywords or not all(isinstance(word, str) and word for word in keywords):
        raise ConfigError(f"reward keyword: keywords={keywords!r}; give a list of at least one word")
    return [sum(occurs(word, text, chinese=chinese) for word in keywords) / len(keywords) for text in completions]


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
def _warn_of_other_scripts() -> None:
    warnings.warn(
        "reward sentiment: most of what it reads is not in Latin script, and VADER's lexicon is English: such texts "
        "score 0; use a classifier of their language (reward classifier), or keyword",
        stacklevel=3,
    )


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    # Reading its lexicon takes 50 ms: once, and only where it is used.
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
