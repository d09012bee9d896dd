"""What a row asks: its prompt, with the system message, earlier turns and tools that stand in columns of their own."""

from __future__ import annotations

from typing import Any

from rlhf_ray.data.chat import Chat, Instruction, Message, Messages, Prompt
from rlhf_ray.data.columns import Columns, Text
from rlhf_ray.data.dialogues import dialogue_messages, is_dialogue
from rlhf_ray.data.messages import said, text_of


def asked(columns: Columns) -> Prompt:
    """The prompt of a row whose answers stand beside it: its column `prompt`, its messages or its instruction."""
    if not columns.has("prompt"):
        if columns.has("messages"):
            return in_context(columns, checked_question(columns, columns.messages("messages"), "messages"))
        if columns.has("instruction"):
            return instructed(columns, columns)
    prompt = columns.text_or_messages("prompt")
    return in_context(columns, checked_question(columns, prompt, "prompt"))


def instructed(columns: Columns, given: Columns) -> Prompt:
    """An instruction and its `input`, which stands in `given`: the row, or one of its instances."""
    return in_context(columns, Instruction(columns.text("instruction"), given.optional_text("input")))


def checked_question(columns: Columns, prompt: Text, role: str) -> Text:
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0]["role"] == "assistant":
        raise columns.error(f"field {columns.name(role)!r} holds an answer but no question")
    return prompt


def with_repeated(columns: Columns, shared: Messages) -> Messages:
    """The prompt of two whole conversations, which a column `prompt` (or `messages`) beside them says once more.

    It may say more than they do at the beginning (a system message, earlier turns), or less at the end. A text that
    is one of their messages is used; one that says something else is left to be named as unused.
    Raises DataError for messages that say something else.
    """
    role = next((role for role in ("prompt", "messages") if columns.says(role)), None)
    if role is None:
        return shared
    given = columns.checked(columns.row.fields[columns.name(role)], role)
    if isinstance(given, str):
        if given.strip() in [text_of(message).strip() for message in shared]:
            columns.value(role)
        return shared
    if role == "messages" and given[-1]["role"] == "assistant":
        return shared  # one of the two conversations once more: it is left to be named as unused
    columns.value(role)
    once, twice = ([_trimmed(message) for message in messages] for messages in (given, shared))
    if once[-len(twice) :] == twice:
        return given
    if twice[: len(once)] == once:
        return shared
    if given[0]["role"] == "system" and twice[: len(once) - 1] == once[1:]:
        return (given[0], *shared)
    if shared[0]["role"] == "system" and twice[1 : len(once) + 1] == once:
        return shared
    raise columns.error(
        f"field {columns.name(role)!r} and the beginning that 'chosen' and 'rejected' share are two different "
        "conversations; keep one of them"
    )


def read_repeated(columns: Columns, messages: Messages) -> None:
    """A column `prompt` that says what the conversation says is used; one that says something else is left to be named.
    """
    value = columns.row.fields[columns.name("prompt")] if columns.says("prompt") else None
    if not isinstance(value, (str, list, tuple)):
        return
    given = columns.checked(value, "prompt")
    if isinstance(given, str):
        is_said = given.strip() in [text_of(message).strip() for message in messages]
    else:
        is_said = [_trimmed(message) for message in given] == [_trimmed(message) for message in messages[: len(given)]]
    if is_said:
        columns.value("prompt")


def in_context(columns: Columns, prompt: Text | Instruction) -> Prompt:
    """A prompt, or a whole conversation, with what other columns of the row give it.

    A plain prompt beside any of them becomes a conversation: nothing but a chat template has a place for them.
    Raises DataError where the row has two system messages that differ.
    """
    system, history = columns.optional_text("system"), columns.history()
    tools, args = columns.tools(), columns.template_args()
    if not isinstance(prompt, tuple) and not (system or history or tools or args):
        return prompt
    messages = as_messages(prompt)
    if not messages:
        raise columns.empty("the prompt is a dialogue without a turn")
    own, messages = _without_system(messages)
    earlier, history = _without_system(history)
    column: Messages = ({"role": "system", "content": system},) if system else ()
    names = (f"field {columns.name('system')!r}", f"field {columns.name('history')!r}", "the conversation")
    systems = [(name, first) for name, first in zip(names, (column, earlier, own), strict=True) if first]
    for name, first in systems[1:]:
        if text_of(first[0]).strip() != text_of(systems[0][1][0]).strip():
            raise columns.error(f"{systems[0][0]} and {name} have two different system messages; keep one of them")
    # The conversation's own form goes first: it may be written in parts.
    return Chat((*(own or earlier or column), *history, *messages), tools, args)


def _without_system(messages: Messages) -> tuple[Messages, Messages]:
    """(a system message at the beginning, the rest)."""
    begins = bool(messages) and messages[0]["role"] == "system"
    return messages[:begins], messages[begins:]


def _trimmed(message: Message) -> tuple[Any, ...]:
    """What a message says, the same in every form and with any white space around it."""
    role, name, text, *others = said(message)
    return (role, name, text.strip(), *others)


def as_messages(prompt: Prompt | Messages) -> Messages:
    """A prompt of any kind as messages; an instruction and its input are two lines, as in LLaMA-Factory."""
    if isinstance(prompt, tuple):
        return prompt
    if isinstance(prompt, Chat):
        return prompt.messages
    if isinstance(prompt, Instruction):
        prompt = "\n".join(part for part in (prompt.instruction, prompt.input) if part)
    elif is_dialogue(prompt):
        return dialogue_messages(prompt)
    return (_said("user", prompt),)


def answered(columns: Columns, prompt: Prompt, answer: Text, role: str) -> tuple[Prompt, Text]:
    """A prompt and an answer, both texts or both messages: what is text becomes a message beside messages."""
    if isinstance(answer, tuple) and not isinstance(prompt, Chat):
        prompt = Chat(as_messages(prompt))
    if isinstance(prompt, Chat) and isinstance(answer, str):
        answer = (_said("assistant", answer),)
    if isinstance(answer, tuple) and answer[0]["role"] != "assistant":
        raise columns.error(f"field {columns.name(role)!r} does not begin with an assistant's message")
    return prompt, answer


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
