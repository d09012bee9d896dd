"""From a data source to token ids for supervised training, preferences and classification."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.cleaning import CleaningReport
from rlhf_ray.data.examples import LabelledText, TokenizedExample, TokenizedPair

OnReport = Callable[[CleaningReport], None]


def ignore(report: CleaningReport) -> None:
    """For callers that do not show what was left out."""


def load_supervised(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """(train, held out) sequences: answers, assistant turns or whole texts are learned.

    Raises DataError, which names file and line.
    """
    raise NotImplementedError


def load_pairs(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """(train, held out) pairs; K ranked answers make C(K, 2) of them. Raises DataError, which names file and line."""
    raise NotImplementedError


def load_labelled(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore
) -> tuple[list[LabelledText], list[LabelledText]]:
    """(train, held out) texts with their class. Raises DataError, which names file and line."""
    raise NotImplementedError
