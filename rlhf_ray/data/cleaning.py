"""Cleaning: what is left out of a dataset, counted by reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CleaningReport:
    """Of `rows` rows of `source`, `kept` examples were made; `dropped` counts the others by reason."""

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        left_out = ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count)
        return f"{self.source}: {self.rows} rows, {self.kept} used" + (f"; left out: {left_out}" if left_out else "")
