"""ROUGE: how much of a reference text a completion has."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_ray.data.words import Chinese, fold, words
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.failures import Failure, Outcome

KINDS = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
_MEASURES = {"precision": 0, "recall": 1, "f1": 2}


def rouge(
    completions: Sequence[str],
    *,
    column: str = "reference",
    kind: str = "rougeL",
    measure: Literal["precision", "recall", "f1"] = "f1",
    stem: bool = False,
    chinese: Chinese = "characters",
    **columns: Any,
) -> Outcome:
    """ROUGE of each completion against the data's `column`, 0 to 1 (Lin, "ROUGE: A Package for Automatic Evaluation of
    Summaries", 2004); of several references, the best. The value for English is that of rouge_score; other scripts
    have their words counted too, those without blanks their characters.

    Args:
        stem: count word forms as one (Porter's stemmer, English).
        chinese: what counts as a word in Chinese: each character, or what a dictionary calls a word.
    """
    if kind not in KINDS or measure not in _MEASURES:
        raise ConfigError(
            f"reward rouge: kind={kind!r}, measure={measure!r}; kind is one of {', '.join(KINDS)}, "
            f"measure one of {', '.join(_MEASURES)}"
        )
    if column not in columns:
        raise ConfigError(
            f"reward rouge: the data has no column {column!r}, only {', '.join(columns)}; set args.column"
        )
    scorer = _scorer(kind, stem, chinese)
    values: list[float | None] = []
    failures: dict[int, Failure] = {}
    for row, (completion, given) in enumerate(zip(completions, columns[column], strict=True)):
        references = [given] if isinstance(given, str) else given
        if not references or not all(isinstance(text, str) for text in references):
            failures[row] = Failure(f"found no text in column {column!r}", "give each row a text, or a list of texts")
            values.append(None)
            continue
        scores = [scorer.score(text, completion)[kind][_MEASURES[measure]] for text in references]
        values.append(max(scores))
    return Outcome(tuple(values), failures)


class _Words:
    """rouge_score's tokens, whose own tokenizer keeps nothing but a-z and 0-9."""

    def __init__(self, stemmer: Any, chinese: Chinese) -> None:
        self.stemmer = stemmer
        self.chinese = chinese

    def tokenize(self, text: str) -> list[str]:
        """Folded words, divided at apostrophes, hyphens and underscores as rouge_score divides them."""
        parts = [p for word in words(fold(text), chinese=self.chinese) for p in re.split(r"['’_-]+", word) if p]
        if self.stemmer is None:
            return parts
        # As in rouge_score, short words stay. The stemmer knows English alone.
        return [self.stemmer.stem(part) if len(part) > 3 and part.isascii() else part for part in parts]


@functools.lru_cache(maxsize=4)
def _scorer(kind: str, stem: bool, chinese: Chinese) -> Any:
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(f"reward rouge needs rouge-score ({error}); pip install 'rlhf-ray[rewards]'") from error
    return RougeScorer([kind], tokenizer=_Words(PorterStemmer() if stem else None, chinese))
