"""One row's values by role, checked: texts, messages, numbers, labels. Every complaint names file and line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from rlhf_ray.config.data import ColumnsConfig
from rlhf_ray.data.calls import tools_of
from rlhf_ray.data.chat import Message, Messages
from rlhf_ray.data.messages import messages_in_text, read_message, read_messages
from rlhf_ray.data.rows import Row
from rlhf_ray.data.values import EmptyRowError, check_text, from_json, plain, says_something, shown, without_padding
from rlhf_ray.errors import DataError

Text: TypeAlias = str | Messages

USUAL = ColumnsConfig()
_MOST_CLASSES = 1 << 20  # more than any classifier has: such a number is an identity, no class
# Other names of a role, where the row has no column of the usual name and exactly one of these.
_ALSO_CALLED = {
    "messages": ("conversations", "conversation"),  # ShareGPT's, whose messages say `from` and `value`
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "output": ("response", "answer"),
    "input": ("context",),
    "label": ("kto_tag",),
    "system": ("system_prompt",),
}


class NamedColumns:
    """The columns that the settings name, of which some may be in no row: a slip that nothing else would show."""

    def __init__(self, names: ColumnsConfig):
        self._left = {role: name for role, name in names if name is not None}

    def see(self, row: Row) -> None:
        if self._left:
            self._left = {role: name for role, name in self._left.items() if name not in row.fields}

    @property
    def absent(self) -> dict[str, str]:
        """By role, those that no row so far has."""
        return dict(self._left)


class Columns:
    """A row as its type reads it: each role's value, under the name that the settings give or the usual one.

    `unused()` tells what of the row nobody asked for.
    """

    def __init__(self, row: Row, names: ColumnsConfig = USUAL):
        self.row, self._names = row, names
        self._given = {name for _, name in names if name is not None}
        self._read: set[str] = set()
        self._unused_keys: Counter[str] = Counter()

    def unused(self) -> Counter[str]:
        """The columns that nothing has read and that say something, and keys of messages that have no use."""
        left = (name for name, value in self.row.fields.items() if name not in self._read and says_something(value))
        return Counter([*map(str, left), *self.unused_keys()])

    def unused_keys(self) -> Counter[str]:
        """Keys of messages that have no use."""
        return Counter(list(self._unused_keys))  # however many messages of the row have it: rows are counted

    def also_unused(self, part: Columns, prefix: str) -> None:
        """What is unused of an object inside this row."""
        self._unused_keys.update(prefix + name for name in part.unused())

    def name(self, role: str) -> str:
        given = self._name_given(role)
        if given is not None or (role in self.row.fields and role not in self._given):
            return given or role
        others = [other for other in _ALSO_CALLED.get(role, ())
                  if self.row.fields.get(other) is not None and other not in self._given]  # fmt: skip
        return others[0] if len(others) == 1 else role

    def _name_given(self, role: str) -> str | None:
        return getattr(self._names, role) if role in ColumnsConfig.model_fields else None

    def _is_anothers(self, role: str) -> bool:
        """Whether the column of this name is, by the settings, that of another role."""
        return self._name_given(role) is None and self.name(role) in self._given

    def has(self, role: str) -> bool:
        # A table has None where a row lacks the column.
        return self.row.fields.get(self.name(role)) is not None and not self._is_anothers(role)

    def says(self, role: str) -> bool:
        """Whether it is there and says something: blank text and empty lists do not."""
        return self.has(role) and says_something(self.row.fields[self.name(role)])

    def has_by_name(self, role: str) -> bool:
        """Whether it is there under its usual name or the one that was given, not under a guessed one."""
        return self.has(role) and self.name(role) not in _ALSO_CALLED.get(role, ())

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.row.where}: {problem}")

    def empty(self, problem: str) -> EmptyRowError:
        return EmptyRowError(f"{self.row.where}: {problem}; remove the row, or fill it")

    def value(self, role: str) -> Any:
        name = self.name(role)
        if name not in self.row.fields or self._is_anothers(role):
            raise self.error(
                f"no field {name!r}; the row has {', '.join(map(repr, self.row.fields)) or 'none'}; "
                "name another with data.columns (data.field for prompts), or mend the row"
            )
        self._read.add(name)
        return self.row.fields[name]

    def text(self, role: str) -> str:
        """A text with something in it."""
        return self.checked_text(self.value(role), role)

    def optional_text(self, role: str) -> str:
        """A text; empty where the row has none."""
        value = self.value(role) if self.has(role) else ""
        return "" if isinstance(value, str) and not value.strip() else self.checked_text(value, role)

    def text_or_messages(self, role: str) -> Text:
        return self.checked(self.value(role), role)

    def messages(self, role: str) -> Messages:
        value = self._listed_in_json(role)
        with self._placed(role):
            return read_messages(value, self._unused_keys)

    def listed(self, role: str) -> Sequence[Any]:
        value = self._listed_in_json(role)
        if not isinstance(value, (list, tuple)):
            raise self.error(f"field {self.name(role)!r} is of type {type(value).__name__}, not a list")
        return value

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """The JSON schemas of the tools; none where the row has none."""
        if not self.says("tools"):
            return ()
        with self._placed("tools"):
            return tools_of(self.value("tools"), self._unused_keys)

    def template_args(self) -> Mapping[str, Any] | None:
        """Variables for the chat template, in TRL's column `chat_template_kwargs`."""
        if not self.says("chat_template_kwargs"):
            return None
        with self._placed("chat_template_kwargs"):
            value = self.value("chat_template_kwargs")
            is_text = isinstance(value, str)
            value = plain(from_json(value) if is_text else value)
            if not isinstance(value, dict):
                raise DataError(f"is {shown(value)}, not an object such as {{\"enable_thinking\": false}}")
            return value if is_text else without_padding(value)

    def history(self) -> Messages:
        """Turns before the prompt: LLaMA-Factory's list of [user, assistant] pairs, or messages."""
        if not self.says("history"):
            return ()
        value = self._listed_in_json("history")
        with self._placed("history"):
            if isinstance(value, (list, tuple)) and all(isinstance(turn, Mapping) for turn in value):
                return read_messages(value, self._unused_keys)
            return _paired(value)

    def number(self, role: str) -> float:
        return self.checked_number(self.value(role), role)

    def label(self, role: str = "label") -> int:
        """A class: 0, 1, ...; true is 1."""
        value = self.value(role)
        if isinstance(value, str):  # a CSV file has nothing but text
            word = value.strip().lower()
            value = int(word) if word.isdecimal() and len(word) < 10 else {"true": 1, "false": 0}.get(word, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
            raise self.error(
                f"field {self.name(role)!r} is {shown(value)}; a label is true, false, or a class 0, 1, 2, ...; "
                "mend it, or set the type to one that reads no label"
            )
        return int(value)

    def checked(self, value: Any, role: str) -> Text:
        """A text, messages (in a cell of a CSV file: their JSON text), or one message for itself."""
        if isinstance(value, str):
            with self._placed(role):
                value = messages_in_text(value) or value
        if isinstance(value, Mapping):
            with self._placed(role):
                return (self._message(value),)
        if isinstance(value, (list, tuple)):
            with self._placed(role):
                return read_messages(value, self._unused_keys)
        return self.checked_text(value, role)

    def checked_number(self, value: Any, role: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"field {self.name(role)!r} has {shown(value)}, not a finite number; mend the row")
        return number

    def checked_text(self, value: Any, role: str) -> str:
        name = self.name(role)
        if not isinstance(value, str):
            raise self.error(
                f"field {name!r} is of type {type(value).__name__}, not text; give a string or chat messages"
            )
        if not value.strip():
            raise self.empty(f"field {name!r} is empty")
        with self._placed(role):
            check_text(value)
        return value

    def _message(self, value: Mapping[str, Any]) -> Message:
        return read_message(value, self._unused_keys)

    def _listed_in_json(self, role: str) -> Any:
        """A CSV file has no lists: there they are written as JSON."""
        value = self.value(role)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with self._placed(role):
                return messages_in_text(value) or from_json(value)
        return value

    @contextmanager
    def _placed(self, role: str) -> Iterator[None]:
        """What is wrong in here is wrong in the column of this role."""
        try:
            yield
        except EmptyRowError as error:
            raise self.empty(f"field {self.name(role)!r} {error}") from error
        except DataError as error:
            raise self.error(f"field {self.name(role)!r} {error}") from error


def _paired(value: Any) -> Messages:
    pairs = value if isinstance(value, (list, tuple)) else [value]
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise DataError(f"holds {shown(pair)}, which is no pair of texts; write [[\"question\", \"answer\"], ...]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            check_text(said)
            if not said.strip():
                raise EmptyRowError("holds a turn without text")
            messages.append({"role": role, "content": said})
    return tuple(messages)
