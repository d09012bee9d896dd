"""The types of dataset, as TRL names them: what a row of each means, how it is recognised, and what is wrong with it.

A row becomes a small frozen record. A prompt is a plain string, a chat or an instruction; an answer is a plain string
or, after a chat, the messages that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.data.chat import Chat
from rlhf_ray.data.columns import USUAL, Columns, Text
from rlhf_ray.data.dialogues import shared_messages, shared_text
from rlhf_ray.data.rows import Row


@dataclass(frozen=True)
class Instruction:
    """What an instruction template fills in; `input` may be empty."""

    instruction: str
    input: str = ""


Prompt: TypeAlias = str | Chat | Instruction


@dataclass(frozen=True)
class PromptRow:
    prompt: Prompt


@dataclass(frozen=True)
class AnswerRow:
    """A prompt and its answer; `label` says whether it is a good one (unpaired preferences), None: not said."""

    prompt: Prompt
    completion: Text
    label: int | None = None


@dataclass(frozen=True)
class TextRow:
    """A text to continue or, with a label, to classify."""

    text: str
    label: int | None = None


@dataclass(frozen=True)
class ConversationRow:
    chat: Chat


@dataclass(frozen=True)
class PreferenceRow:
    prompt: Prompt
    chosen: Text
    rejected: Text
    margin: float = 0.0


@dataclass(frozen=True)
class RankedRow:
    """Answers to one prompt, best first. Equal `scores` mean that neither is better; None: the order is strict."""

    prompt: Prompt
    completions: tuple[Text, ...]
    scores: tuple[float, ...] | None = None


Record: TypeAlias = PromptRow | AnswerRow | TextRow | ConversationRow | PreferenceRow | RankedRow

# What a type needs, by role of the column. The first type whose columns are all there is the row's.
REQUIRED: dict[DataType, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "verl": ("prompt", "data_source", "reward_model"),
    "ranked": ("prompt", "completions"),
    "instruction": ("instruction",),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "messages": ("messages",),
    "labelled": ("text", "label"),
    "text": ("text",),
}


def detect(row: Row, names: ColumnsConfig = USUAL) -> DataType:
    """The type of a row, from the columns that it has. Raises DataError where it is none of them."""
    columns = Columns(row, names)
    for kind, roles in REQUIRED.items():
        if all(columns.has(role) for role in roles):
            return kind
    wanted = ", ".join(dict.fromkeys(role for roles in REQUIRED.values() for role in roles))
    raise columns.error(
        f"none of the fields that say what a row is ({wanted}); it has "
        f"{', '.join(map(repr, row.fields)) or 'none'}; name them with data.columns (data.field for prompts)"
    )


def parse(row: Row, kind: DataType, names: ColumnsConfig = USUAL) -> tuple[Record, ...]:
    """The records of one row: one, but for instruction rows with several `instances`.

    Raises:
        EmptyRowError: its text is empty.
        DataError: it is wrong in another way. Both name file and line.
    """
    return _PARSERS[kind](Columns(row, names))


def prompt_of(record: Record) -> Prompt:
    """What a policy is asked: the prompt of a record; of a conversation, all before its last answer; a text itself."""
    if isinstance(record, TextRow):
        return record.text
    prompt = record.chat if isinstance(record, ConversationRow) else record.prompt
    if isinstance(prompt, Chat) and prompt.messages[-1]["role"] == "assistant":
        return prompt.with_messages(prompt.messages[:-1])
    return prompt


def texts_of(value: Any) -> Iterator[str]:
    """All that is written in a record, or in one of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_of(value.get("content"))
    elif isinstance(value, tuple):
        for part in value:
            yield from texts_of(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from texts_of(getattr(value, field.name))


def _prompt(columns: Columns) -> tuple[Record, ...]:
    return (PromptRow(_asked(columns)),)


def _answer(columns: Columns) -> tuple[Record, ...]:
    prompt, completion = _prompt_and(columns, columns.text_or_messages("completion"), "completion")
    return (AnswerRow(prompt, completion),)


def _unpaired(columns: Columns) -> tuple[Record, ...]:
    prompt, completion = _prompt_and(columns, columns.text_or_messages("completion"), "completion")
    label = columns.label()
    if label > 1:
        raise columns.error(f"field {columns.name('label')!r} is {label}; an unpaired preference is true or false")
    return (AnswerRow(prompt, completion, label),)


def _text(columns: Columns) -> tuple[Record, ...]:
    return (TextRow(columns.text("text")),)


def _labelled(columns: Columns) -> tuple[Record, ...]:
    return (TextRow(columns.text("text"), columns.label()),)


def _conversation(columns: Columns) -> tuple[Record, ...]:
    messages = columns.messages("messages")
    _check_question(columns, messages, "messages")
    return (ConversationRow(Chat(messages)),)


def _instruction(columns: Columns) -> tuple[Record, ...]:
    """Alpaca's instruction, input and output; or Self-Instruct's seed tasks, with a list of instances."""
    instruction = columns.text("instruction")
    if columns.row.fields.get("instances") is None:
        asked = Instruction(instruction, columns.optional_text("input"))
        return (AnswerRow(asked, columns.text("output")) if columns.has("output") else PromptRow(asked),)
    instances = columns.listed("instances")
    if not all(isinstance(item, dict) for item in instances):
        raise columns.error("field 'instances' is no list of objects; write [{\"input\": ..., \"output\": ...}]")
    if not instances:
        raise columns.empty("field 'instances' is an empty list")
    parts = [Columns(Row(item, columns.row.where)) for item in instances]
    return tuple(AnswerRow(Instruction(instruction, p.optional_text("input")), p.text("output")) for p in parts)


def _preference(columns: Columns) -> tuple[Record, ...]:
    chosen, rejected = (columns.text_or_messages(role) for role in ("chosen", "rejected"))
    margin = columns.number("margin") if columns.has("margin") else 0.0
    where = columns.row.where
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise columns.error("one of 'chosen' and 'rejected' is text, the other messages; write both alike")
    if isinstance(chosen, tuple):
        whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
        if whole:  # the prompt is in both, as in UltraFeedback, also where it has a column of its own
            prompt, *answers = shared_messages(chosen, rejected, where=where)
            return (PreferenceRow(Chat(prompt), *answers, margin),)
    elif not columns.has("prompt"):
        prompt, *answers = shared_text(chosen, rejected, where=where)
        for role, answer in zip(("chosen", "rejected"), answers, strict=True):
            if not answer.strip():
                raise columns.empty(f"field {columns.name(role)!r} has no answer after the shared prompt")
        return (PreferenceRow(prompt, *answers, margin),)
    prompt, chosen = _prompt_and(columns, chosen, "chosen")
    prompt, rejected = _prompt_and(columns, rejected, "rejected")
    return (PreferenceRow(prompt, chosen, rejected, margin),)


def _ranked(columns: Columns) -> tuple[Record, ...]:
    given = columns.listed("completions")
    if len(given) < 2:
        raise columns.error(f"field {columns.name('completions')!r} has {len(given)} answers; a ranking needs two")
    pairs = [_prompt_and(columns, columns.checked(item, "completions"), "completions") for item in given]
    prompt, answers = pairs[0][0], [answer for _, answer in pairs]
    if len({type(answer) for answer in answers}) > 1:
        raise columns.error(f"field {columns.name('completions')!r} mixes texts and messages; write all alike")
    if not columns.has("scores"):
        return (RankedRow(prompt, tuple(answers)),)
    scores = [columns.checked_number(score, "scores") for score in columns.listed("scores")]
    if len(scores) != len(answers):
        raise columns.error(f"{len(answers)} completions but {len(scores)} scores; give one score an answer")
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    return (RankedRow(prompt, tuple(answers[i] for i in order), tuple(scores[i] for i in order)),)


def _verl(columns: Columns) -> tuple[Record, ...]:
    judge = columns.value("reward_model")
    if not isinstance(judge, dict) or "ground_truth" not in judge:
        raise columns.error("field 'reward_model' is no object with a 'ground_truth', by which verl rows are judged")
    return _prompt(columns)


_PARSERS: dict[DataType, Callable[[Columns], tuple[Record, ...]]] = {
    "preference": _preference,
    "verl": _verl,
    "ranked": _ranked,
    "instruction": _instruction,
    "unpaired": _unpaired,
    "prompt_completion": _answer,
    "prompt": _prompt,
    "messages": _conversation,
    "labelled": _labelled,
    "text": _text,
}


def _check_question(columns: Columns, prompt: Text, role: str) -> None:
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0]["role"] == "assistant":
        raise columns.error(f"field {columns.name(role)!r} holds an answer but no question")


def _asked(columns: Columns) -> str | Chat:
    prompt = columns.text_or_messages("prompt")
    _check_question(columns, prompt, "prompt")
    return prompt if isinstance(prompt, str) else Chat(prompt)


def _prompt_and(columns: Columns, answer: Text, role: str) -> tuple[str | Chat, Text]:
    """The prompt, and an answer of its kind: beside messages, a text becomes the message of the user or assistant."""
    prompt = _asked(columns)
    if isinstance(prompt, str) and isinstance(answer, tuple):
        prompt = Chat(({"role": "user", "content": prompt},))
    if isinstance(prompt, Chat) and isinstance(answer, str):
        answer = ({"role": "assistant", "content": answer},)
    if isinstance(answer, tuple) and answer[0]["role"] != "assistant":
        raise columns.error(f"field {columns.name(role)!r} does not begin with an assistant's message")
    return prompt, answer
