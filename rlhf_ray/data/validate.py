"""`rlhf-ray validate-data`: every bad row of a data source by file and line, and what the good ones are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import CleaningConfig, DatasetConfig, DataType
from rlhf_ray.data.cleaning import Cleaner
from rlhf_ray.data.datasets import make_encoder
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.rows import Row, placed, read_rows
from rlhf_ray.data.trees import tree_form
from rlhf_ray.data.types import AnswerRow, ConversationRow, PreferenceRow, RankedRow, Record, TextRow, detect
from rlhf_ray.errors import DataError

# Empty rows are complaints here, not something to leave out in silence.
_CLEANING = CleaningConfig(empty=False)


@dataclass(frozen=True)
class BadRow:
    where: str
    why: str


@dataclass(frozen=True)
class ValidationReport:
    """`types` counts the good rows, `left_out` those of them that training drops; `tokens` are of whole sequences."""

    source: str
    rows: int
    types: dict[str, int]
    bad: tuple[BadRow, ...]
    left_out: dict[str, int]
    tokens: dict[str, float] | None = None

    @property
    def is_good(self) -> bool:
        return not self.bad and self.rows > 0

    def __str__(self) -> str:
        lines = [f"{bad.where}: {bad.why}" for bad in self.bad]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.types.items()) or "none good"
        lines.append(f"{self.source}: {self.rows} rows: {kinds}; {len(self.bad)} bad")
        if self.left_out:
            lines.append("training leaves out: " + ", ".join(f"{count} {why}" for why, count in self.left_out.items()))
        if self.tokens:
            lines.append("tokens a sequence: " + ", ".join(f"{name} {size:g}" for name, size in self.tokens.items()))
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def validate(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, max_length: int | None = None
) -> ValidationReport:
    """Reads every row of `data.path` as training would; `type: auto` is that of the first row that has one.

    With a tokenizer the rows are tokenized too: what the template refuses is bad, and so is what has more than
    `max_length` tokens. Raises DataError only for a source that cannot be opened.
    """
    encoder = tokenizer and make_encoder(data, tokenizer)
    kind: DataType | None = None if data.type == "auto" else data.type
    cleaner = Cleaner(_CLEANING, max_length=data.max_length, overlong="error")
    bad: list[BadRow] = []
    types: Counter[str] = Counter()
    lengths: list[int] = []
    rows = read_rows(
        data.path,
        split=data.split,
        on_bad=lambda error: bad.append(_complaint(error)),
        trees_as=tree_form(data.type, "messages"),
        dropped=cleaner.dropped,
    )
    for row in rows:
        try:
            kind = kind or detect(row, data.columns)
            sizes = [
                size for record in cleaner.wanted(row, kind, data.columns) for size in _sizes(record, encoder, row)
            ]
            if max_length is not None and max(sizes, default=0) > max_length:
                raise DataError(f"{row.where}: {max(sizes)} tokens, the limit is {max_length}; shorten the row")
        except DataError as error:
            bad.append(_complaint(error))
            continue
        types[kind] += 1
        lengths += sizes
    tokens = {"mean": round(sum(lengths) / len(lengths), 1), "max": float(max(lengths))} if lengths else None
    good = sum(types.values())
    return ValidationReport(data.path, good + len(bad), dict(types), tuple(bad), dict(cleaner.dropped), tokens)


def columns_from(pairs: Sequence[str]) -> dict[str, str]:
    """`prompt=question` -> the columns setting. Raises DataError for what is no such pair."""
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise DataError(f"--column {wrong[0]}: no role=column pair; write one such as prompt=question")
    return dict(pair.split("=", 1) for pair in pairs)


def _complaint(error: DataError) -> BadRow:
    where, why = str(error).split(": ", 1)
    return BadRow(where, why)


def _sizes(record: Record, encoder: Encoder | None, row: Row) -> list[int]:
    """Tokens of each sequence that a record makes."""
    if encoder is None:
        return []
    with placed(row.where):
        if isinstance(record, TextRow):
            return [len(encoder.text(record.text).token_ids)]
        if isinstance(record, ConversationRow):
            if any(message["role"] == "assistant" for message in record.chat.messages):
                return [len(example.token_ids) for example in encoder.conversation(record.chat)]
            return [len(encoder.prompt(record.chat)[1])]
        answers = _answers(record)
        if not answers:
            return [len(encoder.prompt(record.prompt)[1])]
        return [len(encoder.answer(record.prompt, answer).token_ids) for answer in answers]


def _answers(record: Record) -> Sequence[Any]:
    if isinstance(record, PreferenceRow):
        return (record.chosen, record.rejected)
    if isinstance(record, RankedRow):
        return record.completions
    return (record.completion,) if isinstance(record, AnswerRow) else ()
