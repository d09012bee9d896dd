"""Token ids that training reads, each with what is learned of it: made by data/datasets.py, read by the trainers.

`source` is the name of the source that a row comes from; empty where there is only one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizedExample:
    """One sequence; `learned[t]` = the loss is taken on token t (EOS included). Both are of length T."""

    token_ids: tuple[int, ...]
    learned: tuple[bool, ...]
    source: str = ""


@dataclass(frozen=True)
class TokenizedPair:
    """Two answers to one prompt, each a whole sequence. `margin` is how much better (0: not known)."""

    chosen: TokenizedExample
    rejected: TokenizedExample
    margin: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class LabelledAnswer(TokenizedExample):
    """A prompt and an answer that somebody has found good or bad."""

    good: bool = True


@dataclass(frozen=True)
class LabelledText:
    """A text as a classifier reads it (with its special tokens), and its class: 0, 1, ..."""

    token_ids: tuple[int, ...]
    label: int
    source: str = ""
