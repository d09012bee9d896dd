"""`rlhf-ray validate-data`: every bad row of a data source by file and line, and what a command makes of the good ones.

Each row goes through the code that the command itself reads it with, so both take, leave out and refuse the same rows.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, get_args

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig, DataType
from rlhf_ray.data.cleaning import Cleaner
from rlhf_ray.data.columns import NamedColumns
from rlhf_ray.data.datasets import labelled, make_encoder
from rlhf_ray.data.examples import LabelledAnswer, LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.prompt_rows import PromptRows
from rlhf_ray.data.quality import NOTHING_MORE, QualityWatch, QualityWishes
from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.trees import TreeForm, tree_form
from rlhf_ray.data.types import ConversationRow, PromptRow, Record, detect, parse
from rlhf_ray.data.uses import Comparisons, Demonstrations, LabelledAnswers, Use
from rlhf_ray.data.validation_report import RowNote, ShownRow, ShownSequence, ValidationReport
from rlhf_ray.data.values import EmptyRowError
from rlhf_ray.errors import DataError

Command = Literal["sft", "rm", "dpo", "kto", "classifier", "rl"]  # kto: dpo with dpo.kind=kto
Named = tuple[str, TokenizedExample]
_NO_LIMIT = 1 << 60
_PATIENCE = 1000  # bad rows, after which no good one is waited for to tell what the rows are for
_TREES: dict[Command, TreeForm] = {"rm": "ranked", "dpo": "ranked", "kto": "ranked", "rl": "prompt"}
# What a type is for, where that is one thing.
_SUITED: dict[DataType, Command] = {
    "preference": "rm", "ranked": "rm", "verl": "rl", "prompt": "rl", "labelled": "classifier",
}  # fmt: skip


def validate(
    data: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
    command: Command | None = None,
    show: int | None = None,
    wishes: QualityWishes = NOTHING_MORE,
) -> ValidationReport:
    """Reads every row of `data.path` as `command` would (None: as the one that the first good row suits).

    With a tokenizer the rows are tokenized too: what the template refuses is bad, and so is what has more than
    `max_length` tokens (None: no length is). The report then shows one row with its learned tokens: the first good one,
    or that of line (or number) `show`. `wishes` asks for near duplicates, overlap with other files and personal data.
    Raises DataError only for a source that cannot be opened.
    """
    data = data.model_copy(update={"max_length": max_length or _NO_LIMIT})
    found = _Findings(data, tokenizer, command, show, QualityWatch(wishes, data))
    form = tree_form(data.type, _TREES.get(command or "sft", "messages"))
    rows = read_rows(data.path, split=data.split, on_bad=found.refuse, trees_as=form, dropped=found.read_as)
    for row in itertools.islice(rows, data.limit):
        found.add(row)
    return found.report()


def columns_from(pairs: Sequence[str]) -> dict[str, str]:
    """`prompt=question` -> the columns setting. Raises DataError for what is no such pair."""
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise DataError(f"--column {wrong[0]}: no role=column pair; write one such as prompt=question")
    return dict(pair.split("=", 1) for pair in pairs)


def command_from(name: str | None) -> Command | None:
    """The command that `--for` names; `eval` and `pairs` ask as `rl` does. Raises DataError for another."""
    if name is None or name in get_args(Command):
        return name
    if name in ("eval", "pairs"):
        return "rl"
    raise DataError(f"--for {name}: no command that reads rows; give one of {', '.join(get_args(Command))}")


class _Findings:
    """Sees each row once, in order."""

    def __init__(
        self, data: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None, command: Command | None,
        show: int | None, watch: QualityWatch,
    ):  # fmt: skip
        self._data, self._tokenizer, self._command, self._show = data, tokenizer, command, show
        self._watch = watch
        self._reader: _Reader | None = None
        self._named = NamedColumns(data.columns)
        self._waiting: list[Row | DataError] = []  # until it is known who reads them
        self.read_as: Counter[str] = Counter()  # what reading itself leaves out, by reason
        self._types: Counter[str] = Counter()
        self._bad: list[RowNote] = []
        self._left_out: list[RowNote] = []
        self._lengths: list[int] = []
        self._kept = 0
        self._shown: ShownRow | None = None

    def refuse(self, error: DataError) -> None:
        """A row that could not be read at all."""
        if self._reader is None:
            self._waiting.append(error)
            return
        where, _, why = str(error).partition(": ")
        self._bad.append(RowNote(where, why))

    def add(self, row: Row) -> None:
        if self._reader is not None:
            self._take(row)
            return
        self._waiting.append(row)
        command = self._command or _suited(row, self._data)
        if command is not None or len(self._waiting) == _PATIENCE:
            self._begin(command)

    def _begin(self, command: Command | None) -> None:
        """From now on it is known who reads: the rows so far are read again as `command` reads them, in their order."""
        self._command = command or _suited_by_type(self._waiting, self._data)
        self._reader = _reader(self._command, self._data, self._tokenizer)
        for item in self._waiting:
            if isinstance(item, Row):
                self._take(item)
            else:
                self.refuse(item)

    def _take(self, row: Row) -> None:
        self._named.see(row)
        try:
            Fingerprint().add(row.fields, row.where)  # a run takes one of its rows
            before = Counter(self._reader.dropped)
            records, made, sequences = self._reader.read(row)
            self._watch.see(row, records)
        except DataError as error:
            self.refuse(error)
            return
        gone = [RowNote(row.where, reason) for reason in (self._reader.dropped - before).elements()]
        self._left_out += gone
        self._types[str(self._reader.kind)] += 1
        self._kept += made if self._tokenizer is not None else max(0, len(records) - len(gone))
        self._lengths += [len(example.token_ids) for _, example in sequences]
        if sequences and self._shown is None and self._show in (None, _number(row.where)):
            shown = (ShownSequence.of(name, example, self._tokenizer) for name, example in sequences)
            self._shown = ShownRow(row.where, tuple(shown))

    def report(self) -> ValidationReport:
        if self._reader is None:
            self._begin(self._command)
        dropped, unused, lengths = self._reader.dropped, self._reader.unused, self._lengths
        return ValidationReport(
            source=self._data.path,
            command=self._command,
            rows=self._types.total() + len(self._bad),
            types=dict(self._types),
            bad=tuple(self._bad),
            left_out=dict(dropped + self.read_as),
            left_out_rows=tuple(self._left_out),
            kept=self._kept,
            unused=dict(unused),
            absent=self._named.absent if self._types or self._bad else {},
            tokens={"mean": round(sum(lengths) / len(lengths), 1), "max": float(max(lengths))} if lengths else None,
            shown=self._shown,
            quality=self._watch.report(),
        )


class _Reader(Protocol):
    """Rows as one command reads them. `kind` is their type, once it is known."""

    kind: DataType | None
    dropped: Counter[str]
    unused: Counter[str]

    def read(self, row: Row) -> tuple[list[Record], int, list[Named]]:
        """(the records that are used, how many examples they make, the sequences of these by name). Raises DataError.

        A pair is one example of two sequences.
        """
        ...


class _Supervised:
    def __init__(self, data: DatasetConfig, use: Use[object]):
        self._names, self._use = data.columns, use
        self.kind: DataType | None = None if data.type == "auto" else data.type
        self._cleaner = Cleaner(data.cleaning, max_length=data.max_length, overlong=data.overlong)
        self.dropped, self.unused = self._cleaner.dropped, self._cleaner.unused

    def read(self, row: Row) -> tuple[list[Record], int, list[Named]]:
        self.kind = self.kind or detect(row, self._names)
        records = self._cleaner.wanted(row, self.kind, self._names)
        items = [item for record in records for item in self._use(record, self._cleaner, row.where)]
        return records, len(items), [named for item in items for named in _named(item)]


class _Asked:
    def __init__(self, rows: PromptRows):
        self._rows = rows
        self.dropped, self.unused = rows.dropped, rows.unused

    @property
    def kind(self) -> DataType | None:
        return self._rows.kind

    def read(self, row: Row) -> tuple[list[Record], int, list[Named]]:
        made = [self._rows.example(prompt, columns, row.where) for prompt, columns in self._rows.asked(row)]
        used = [pair for pair in made if pair is not None]
        sequences = [("", TokenizedExample(ids, (False,) * len(ids))) for _, ids in used if ids]
        return [PromptRow(example.asked) for example, _ in used], len(used), sequences


def _reader(command: Command, data: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None) -> _Reader:
    if command == "classifier":
        return _Supervised(data, labelled(data, tokenizer))
    encoder = None if tokenizer is None else make_encoder(data, tokenizer)
    if command == "rl":
        # As `data.field` does, a name of the prompt's column decides the type too.
        field = data.columns.prompt if data.type == "auto" else None
        kind = None if data.type == "auto" else data.type
        return _Asked(PromptRows(encoder, field, None, data.max_length, names=data.columns, kind=kind))
    if command == "kto":
        return _Supervised(data, LabelledAnswers(encoder))
    use = Demonstrations(encoder) if command == "sft" else Comparisons(encoder, judged=command == "rm")
    return _Supervised(data, use)


def _suited(row: Row, data: DatasetConfig) -> Command | None:
    """The command that rows such as this one are for; None where the row is bad for any."""
    try:
        kind = detect(row, data.columns) if data.type == "auto" else data.type
        record = parse(row, kind, data.columns)[0]
    except EmptyRowError:
        return _suited_by_type([row], data)
    except DataError:
        return None
    is_asked = isinstance(record, PromptRow) or (
        isinstance(record, ConversationRow) and all(said["role"] != "assistant" for said in record.chat.messages)
    )
    return "rl" if is_asked else _SUITED.get(kind, "sft")


def _suited_by_type(rows: Sequence[Row | DataError], data: DatasetConfig) -> Command:
    """As far as the type of the first row that has one tells."""
    for row in rows:
        with contextlib.suppress(DataError):
            kind = data.type if data.type != "auto" else detect(row, data.columns) if isinstance(row, Row) else None
            if kind is not None:
                return _SUITED.get(kind, "sft")
    return "sft"


def _named(item: object) -> Iterator[Named]:
    if isinstance(item, TokenizedPair):
        yield "chosen", item.chosen
        yield "rejected", item.rejected
    elif isinstance(item, LabelledText):
        yield f"label {item.label}", TokenizedExample(item.token_ids, (False,) * len(item.token_ids))
    elif isinstance(item, LabelledAnswer):
        yield "good" if item.good else "bad", item
    elif isinstance(item, TokenizedExample):
        yield "", item


def _number(where: str) -> int | None:
    """The line of `file:line`, the index of `dataset:index`."""
    found = re.search(r"(\d+)\]?$", where)
    return int(found[1]) if found else None
