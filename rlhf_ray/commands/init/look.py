"""What `rlhf-ray init` sees in a data file: its type, its columns, and how long its texts are."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.config.data import ColumnsConfig, DatasetConfig, DataType
from rlhf_ray.config.load import parse_config
from rlhf_ray.data.chat import Chat, Instruction
from rlhf_ray.data.columns import Columns
from rlhf_ray.data.paths import looks_local
from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.types import parse, prompts_in
from rlhf_ray.data.validate import validate
from rlhf_ray.errors import DataError

Command = Literal["sft", "rm", "dpo", "rl"]
# Enough to see what the rows are; of a larger file the rest is not read.
MOST_ROWS = 5000
_SHOWN = 3
# Whose columns a person is asked for where no type fits, and whether there must be one.
ROLES: dict[Command, dict[str, bool]] = {
    "sft": {"prompt": True, "completion": True},
    "rl": {"prompt": True, "completion": False},
    "rm": {"prompt": False, "chosen": True, "rejected": True},
    "dpo": {"prompt": False, "chosen": True, "rejected": True},
}


@dataclass(frozen=True)
class Look:
    """Of the first rows of a source. `longest_prompt` and `longest_text` are in bytes of UTF-8.

    `kind` is None for a dataset of the Hub, which is not opened. `answer` is the column with the answer that follows a
    plain prompt, if there is one.
    """

    source: str
    kind: DataType | None = None
    columns: tuple[str, ...] = ()
    rows: int = 0
    is_chat: bool = False
    answer: str | None = None
    longest_prompt: int = 0
    longest_text: int = 0

    @property
    def is_text(self) -> bool:
        """Whether its rows are texts without a prompt."""
        return self.kind in ("text", "labelled")

    def __str__(self) -> str:
        if self.kind is None:
            return f"{self.source}: not opened, for it is on the Hub"
        count = f"the first {self.rows} rows are" if self.rows == MOST_ROWS else f"{self.rows} rows"
        return f"{self.source}: {count} of type {self.kind}; columns {', '.join(self.columns)}"


def columns_of(source: str) -> tuple[str, ...]:
    """The columns of the first row. Raises DataError where there is none."""
    for row in read_rows(source, trees_as=None):
        return tuple(map(str, row.fields))
    raise DataError(f"{source}: the file has no rows; name another, or fill it")


def _without_role(source: str) -> str:
    """The first column whose name says nothing about what is in it."""
    known = {"id", *ColumnsConfig.model_fields}
    with contextlib.suppress(DataError):  # the report says what is wrong with the first row
        return next((name for name in columns_of(source) if name.lower() not in known), "question")
    return "question"


def _first_role(command: Command) -> str:
    return next(role for role, is_needed in ROLES[command].items() if is_needed)


def look(source: str, command: Command, names: Mapping[str, str]) -> Look:
    """Reads the first rows as `command` would. `names`: roles whose columns have names of their own.

    Raises:
        DataError: it cannot be read, or a row of it is not what the command learns from.
    """
    if not looks_local(source):
        return Look(source)
    data = parse_config(
        {"path": source, "limit": MOST_ROWS, "columns": dict(names)}, DatasetConfig, source="rlhf-ray init"
    )
    report = validate(data, command=command)
    if not report.is_good:
        notes = [f"  {note.where}: {note.why}" for note in report.bad[:_SHOWN]]
        more = [f"  ... and {len(report.bad) - _SHOWN} more bad rows"] if len(report.bad) > _SHOWN else []
        what = f"{len(report.bad)} of {report.rows} rows are not what `{command}` reads" if notes else "no row is left"
        raise DataError("\n".join([
            f"{source}: {what}", *notes, *more,
            f"`rlhf-ray validate-data {source} --for {command}` has them all; a column with another name: "
            f"--column {_first_role(command)}={shlex.quote(_without_role(source))}",
        ]))  # fmt: skip
    form = "prompt" if command == "rl" else "ranked" if command in ("rm", "dpo") else "messages"
    rows = list(itertools.islice(read_rows(source, trees_as=form), MOST_ROWS))
    if len(rows) < 2:
        raise DataError(f"{source}: it has one row, and a run keeps some apart to see how it does; give at least two")
    kind = next(iter(report.types))
    asked = [prompt for row in rows for prompt in _asked(row, kind, command, data.columns)]
    return Look(
        source=source,
        kind=kind,
        columns=tuple(dict.fromkeys(str(name) for row in rows for name in row.fields)),
        rows=len(rows),
        is_chat=any(isinstance(prompt, Chat) for prompt in asked),
        answer=_answer(rows[0], kind, data.columns),
        longest_prompt=max(sum(map(_size, _texts(prompt))) for prompt in asked),
        longest_text=max(map(_longest, rows)),
    )


def _asked(row: Row, kind: DataType, command: Command, names: ColumnsConfig) -> Iterator[Any]:
    """What a row asks: a text, an instruction or a conversation. Nothing of a row that the command leaves out."""
    with contextlib.suppress(DataError):
        if command == "rl":
            yield from prompts_in(row, kind, names)
        else:
            for record in parse(row, kind, names):
                yield getattr(record, "prompt", None) or getattr(record, "chat", None) or getattr(record, "text", "")


def _answer(row: Row, kind: DataType, names: ColumnsConfig) -> str | None:
    """Also beside a prompt whose column was named: the type is `prompt` then."""
    role = "output" if kind == "instruction" else "completion"
    name = Columns(row, names).name(role)
    follows = kind in ("prompt", "prompt_completion", "unpaired", "instruction")
    return name if follows and isinstance(row.fields.get(name), str) else None


def _longest(row: Row) -> int:
    """Bytes of a row's texts; of two answers to compare, only the longer one is in a sequence."""
    sizes = {name: sum(map(_size, _texts(value))) for name, value in row.fields.items()}
    return sum(sizes.values()) - min(sizes.get("chosen", 0), sizes.get("rejected", 0))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(tuple(value.values()))
    elif isinstance(value, (Chat, Instruction)):
        yield from _texts(tuple(vars(value).values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
