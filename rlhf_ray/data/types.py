"""The types of dataset, as TRL names them: what a row of each means, how it is recognised, and what is wrong with it.

A row becomes a small frozen record. A prompt is a plain string, a chat or an instruction; an answer is a plain string
or, after a chat, the messages that follow it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.data.asking import answered, asked, checked_question, in_context, instructed, read_repeated, with_repeated
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.columns import USUAL, Columns, Text
from rlhf_ray.data.dialogues import dialogue_messages, is_dialogue, shared_messages, shared_text
from rlhf_ray.data.messages import text_of
from rlhf_ray.data.rows import Row


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
REQUIRED: tuple[tuple[DataType, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("verl", ("prompt", "data_source", "reward_model")),
    ("ranked", ("prompt", "completions")),
    ("instruction", ("instruction",)),
    ("unpaired", ("prompt", "completion", "label")),
    ("prompt_completion", ("prompt", "completion")),
    ("unpaired", ("messages", "label")),
    ("messages", ("prompt", "messages")),  # UltraChat: the prompt is the conversation's first message once more
    ("prompt", ("prompt",)),
    ("messages", ("messages",)),
    ("labelled", ("text", "label")),
    ("text", ("text",)),
)


def detect(row: Row, names: ColumnsConfig = USUAL) -> DataType:
    """The type of a row, from the columns that it has. Raises DataError where it is none of them.

    A prompt under a name that is only usual for it (`question`) counts where no other type fits.
    """
    columns = Columns(row, names)
    for has_prompt in (columns.has_by_name, columns.has):
        for kind, roles in REQUIRED:
            if all(has_prompt(role) if role == "prompt" else columns.has(role) for role in roles):
                return kind
    wanted = ", ".join(dict.fromkeys(role for _, roles in REQUIRED for role in roles))
    raise columns.error(
        f"none of the fields that say what a row is ({wanted}); it has "
        f"{', '.join(map(repr, row.fields)) or 'none'}; name them with data.columns (data.field for prompts)"
    )


def detect_asked(row: Row, names: ColumnsConfig = USUAL) -> DataType:
    """The type of a row of which nothing but the prompt is wanted: a column `prompt` is it, whatever is beside."""
    kind, columns = detect(row, names), Columns(row, names)
    is_conversation = kind == "messages" or (kind == "unpaired" and not columns.has("completion"))
    return "prompt" if is_conversation and columns.has_by_name("prompt") else kind


def parse(
    row: Row, kind: DataType, names: ColumnsConfig = USUAL, unused: Counter[str] | None = None
) -> tuple[Record, ...]:
    """The records of one row: one, but for instruction rows with several `instances`.

    `unused` counts, by name, the columns and the keys of messages that have no use.

    Raises:
        EmptyRowError: its text is empty.
        DataError: it is wrong in another way. Both name file and line.
    """
    columns = Columns(row, names)
    records = _PARSERS[kind](columns)
    if unused is not None:
        unused.update(columns.unused())
    return records


def prompts_in(
    row: Row, kind: DataType, names: ColumnsConfig = USUAL, unused: Counter[str] | None = None
) -> tuple[Prompt, ...]:
    """What a policy is asked by one row. Its answers and labels are for reward functions: they need not be there, nor
    be of this type's form. `unused` counts keys of messages only, for every other column reaches the rewards.

    Raises as `parse` does.
    """
    columns = Columns(row, names)
    if kind == "labelled":
        prompts: tuple[Prompt, ...] = (columns.text("text"),)
    elif kind == "instruction":
        prompts = tuple(instructed(columns, given) for given in _instances(columns))
    elif kind == "unpaired" and not columns.has("prompt"):
        prompts = (prompt_of(*_conversation(columns)),)
    elif kind in ("prompt", "verl", "prompt_completion", "unpaired", "ranked"):
        prompts = (asked(columns),)
    else:
        prompts = tuple(prompt_of(record) for record in _PARSERS[kind](columns))
    if unused is not None:
        unused.update(columns.unused_keys())
        # Nothing of a prompt is learned, so there is nothing to weigh.
        if any(isinstance(p, Chat) and any("weight" in message for message in p.messages) for p in prompts):
            unused["messages[].weight"] += 1
    return prompts


def prompt_column(row: Row, kind: DataType, names: ColumnsConfig = USUAL) -> str | None:
    """The column that the prompt stands in; None where there is no such one."""
    columns = Columns(row, names)
    if kind in ("text", "labelled"):
        return columns.name("text")
    if kind == "messages" or not columns.has("prompt") and columns.has("messages"):
        return columns.name("messages")
    return None if kind == "instruction" else columns.name("prompt")


def prompt_of(record: Record) -> Prompt:
    """What a policy is asked: the prompt of a record; of a conversation, all before its last answer; a text itself.

    A prompt that ends with words of the assistant is one to go on with: they stay.
    """
    if isinstance(record, TextRow):
        return record.text
    if not isinstance(record, ConversationRow):
        return record.prompt
    chat = record.chat
    return chat.with_messages(chat.messages[:-1]) if chat.messages[-1]["role"] == "assistant" else chat


def texts_of(value: Any) -> Iterator[str]:
    """All that is written in a record, or in one of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield text_of(value)
    elif isinstance(value, tuple):
        for part in value:
            yield from texts_of(part)
    elif isinstance(value, Chat):
        yield from texts_of(value.messages)
    elif is_dataclass(value):
        for field in fields(value):
            yield from texts_of(getattr(value, field.name))


def _prompt(columns: Columns) -> tuple[Record, ...]:
    return (PromptRow(asked(columns)),)


def _answer(columns: Columns) -> tuple[Record, ...]:
    answer = columns.text_or_messages("completion")
    return (AnswerRow(*answered(columns, asked(columns), answer, "completion")),)


def _unpaired(columns: Columns) -> tuple[Record, ...]:
    label = columns.label()
    if label > 1:
        raise columns.error(f"field {columns.name('label')!r} is {label}; an unpaired preference is true or false")
    if columns.has("prompt") and columns.has("completion") or not columns.has("messages"):
        record = _answer(columns)[0]
        _check_weights(columns, record.completion, "completion")
        return (AnswerRow(record.prompt, record.completion, label),)
    chat = _conversation(columns)[0].chat
    if chat.messages[-1]["role"] != "assistant":
        raise columns.error(f"field {columns.name('messages')!r} does not end with the answer that is labelled")
    _check_weights(columns, chat.messages[-1:], "messages")
    return (AnswerRow(chat.with_messages(chat.messages[:-1]), chat.messages[-1:], label),)


def _text(columns: Columns) -> tuple[Record, ...]:
    return (TextRow(columns.text("text")),)


def _labelled(columns: Columns) -> tuple[Record, ...]:
    return (TextRow(columns.text("text"), columns.label()),)


def _conversation(columns: Columns) -> tuple[ConversationRow, ...]:
    messages = checked_question(columns, columns.messages("messages"), "messages")
    read_repeated(columns, messages)
    chat = in_context(columns, messages)
    assert isinstance(chat, Chat)
    return (ConversationRow(chat),)


def _instruction(columns: Columns) -> tuple[Record, ...]:
    """Alpaca's instruction, input and output; or Self-Instruct's seed tasks, with a list of instances."""
    records: list[Record] = []
    for given in _instances(columns):
        prompt = instructed(columns, given)
        if given is columns and not columns.has("output"):
            records.append(PromptRow(prompt))
        else:
            records.append(AnswerRow(*answered(columns, prompt, given.text("output"), "output")))
        if given is not columns:
            columns.also_unused(given, "instances[].")
    return tuple(records)


def _instances(columns: Columns) -> list[Columns]:
    """Where the input and the output of an instruction stand: in the row, or in each of its instances."""
    if columns.row.fields.get("instances") is None:
        return [columns]
    instances = columns.listed("instances")
    if not all(isinstance(item, dict) for item in instances):
        raise columns.error("field 'instances' is no list of objects; write [{\"input\": ..., \"output\": ...}]")
    if not instances:
        raise columns.empty("field 'instances' is an empty list")
    return [Columns(Row(item, columns.row.where)) for item in instances]


def _preference(columns: Columns) -> tuple[Record, ...]:
    chosen, rejected = (columns.text_or_messages(role) for role in ("chosen", "rejected"))
    margin = columns.number("margin") if columns.has("margin") else 0.0
    where = columns.row.where
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise columns.error("one of 'chosen' and 'rejected' is text, the other messages; write both alike")
    for role, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_weights(columns, answer, role)
    if isinstance(chosen, tuple) and chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        # The prompt is in both, as in UltraFeedback, also where it has a column of its own.
        prompt, *answers = shared_messages(chosen, rejected, where=where)
        return (PreferenceRow(in_context(columns, with_repeated(columns, prompt)), *answers, margin),)
    if isinstance(chosen, str) and not _has_prompt(columns, chosen, rejected):
        prompt, *answers = shared_text(chosen, rejected, where=where)
        for role, answer in zip(("chosen", "rejected"), answers, strict=True):
            if not answer.strip():
                raise columns.empty(f"field {columns.name(role)!r} has no answer after the shared prompt")
        asks = in_context(columns, prompt)
        if isinstance(asks, Chat):
            answers = [({"role": "assistant", "content": answer.strip()},) for answer in answers]
        return (PreferenceRow(asks, *answers, margin),)
    asks = asked(columns)
    prompt, chosen = answered(columns, asks, chosen, "chosen")
    _, rejected = answered(columns, asks, rejected, "rejected")
    return (PreferenceRow(prompt, chosen, rejected, margin),)


def _has_prompt(columns: Columns, chosen: str, rejected: str) -> bool:
    """Whether two texts are answers only. Two whole dialogues hold their prompt, whatever stands beside.

    A column `prompt` that says what both dialogues say is used; one that says something else is left to be named.
    """
    if not (is_dialogue(chosen) and is_dialogue(rejected)):
        return any(columns.has(role) for role in ("prompt", "messages", "instruction"))
    if columns.has("prompt") and isinstance(columns.row.fields[columns.name("prompt")], str):
        given = columns.row.fields[columns.name("prompt")].strip()
        begins = all(answer.strip().startswith(given) for answer in (chosen, rejected))
        if begins or given in [text_of(message) for message in dialogue_messages(chosen)]:
            columns.value("prompt")
    return False


def _check_weights(columns: Columns, answer: Text, role: str) -> None:
    if isinstance(answer, tuple) and any(message.get("weight") == 0 and message["role"] == "assistant"
                                         for message in answer):  # fmt: skip
        raise columns.error(
            f"field {columns.name(role)!r} holds an answer of weight 0, and this type learns whole answers; remove the "
            "weight or the row"
        )


def _ranked(columns: Columns) -> tuple[Record, ...]:
    given = columns.listed("completions")
    if len(given) < 2:
        raise columns.error(f"field {columns.name('completions')!r} has {len(given)} answers; a ranking needs two")
    asks = asked(columns)
    pairs = [answered(columns, asks, columns.checked(item, "completions"), "completions") for item in given]
    prompt, answers = pairs[0][0], [answer for _, answer in pairs]
    if len({type(answer) for answer in answers}) > 1:
        raise columns.error(f"field {columns.name('completions')!r} mixes texts and messages; write all alike")
    for answer in answers:
        _check_weights(columns, answer, "completions")
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
