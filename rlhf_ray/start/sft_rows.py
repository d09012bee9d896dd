"""The rows that a policy goes on to learn while it is reinforced (`sft_data`), read before anything starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import SFTDataConfig
from rlhf_ray.config.sections import ModelConfig
from rlhf_ray.data.cleaning import CleaningReport, fingerprints_of
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.data.stream import Part, described
from rlhf_ray.errors import DataError
from rlhf_ray.models.fits import limits_of, require_rows_fit
from rlhf_ray.roles.sft_term import SFTRows


@dataclass(frozen=True)
class SFTData:
    """The rows, and what is to be said of how they were read."""

    rows: SFTRows
    reports: tuple[CleaningReport, ...]

    @property
    def notes(self) -> list[str]:
        """Lines for people."""
        mixture = [f"sft_data: {described(self.rows.parts)}"] if len(self.rows.parts) > 1 else []
        return [*(f"sft_data: {report}" for report in self.reports), *mixture]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the rows as they were read, by source: a resumed run must find the same."""
        return {f"sft_data: {source}": read for source, read in fingerprints_of(self.reports).items()}


def load_sft_data(
    data: SFTDataConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, clock: datetime | None
) -> SFTData:
    """`clock`: what a chat template takes for now. Raises RlhfRayError for rows that this model cannot learn."""
    reports: list[CleaningReport] = []
    try:
        examples, _ = load_supervised(data, tokenizer, seed=seed, on_report=reports.append, clock=clock)
    except DataError as error:
        raise DataError(f"sft_data (where it says data.*, sft_data.* is meant): {error}") from error
    limits = limits_of(model.path, trust_remote_code=model.trust_remote_code)
    require_rows_fit(limits, tokenizer, [example.token_ids for example in examples], "sft_data")
    counts = Counter(example.source for example in examples)
    parts = tuple(Part(part.name, counts[part.name], part.weight) for part in data.parts)
    return SFTData(SFTRows(tuple(examples), parts, data.batch_size), tuple(reports))
