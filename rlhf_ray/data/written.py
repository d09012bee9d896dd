"""Whether a rendered text holds all that its conversation says: templates drop what they do not know, without a word.

A template for plain chats writes no tool calls, one for images no plain text. What it drops, a model would neither read
nor learn, so such a conversation is refused. Strings are looked for as templates write them: trimmed, or escaped as in
JSON, once or twice. The messages are looked for one after another, so that a call is not found in the tool's schema;
and an answer that tools reply to also in the text that ends with it, so that a call is not found in its reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_ray.data.chat import Chat, Message
from rlhf_ray.data.messages import REASONING
from rlhf_ray.data.rendering import common_length
from rlhf_ray.errors import DataError

_THOUGHT = re.compile(r"</?think(?:ing)?>")
_FIRST = ("system", "developer")  # templates gather these at the top, or put them before the user's turn
_SHORT = 40


def check_written(
    chat: Chat, text: str, since: int = 0, write: Callable[[Chat], str | None] = lambda chat: None
) -> set[str]:
    """Names of what the template leaves out without harm: ids and names that link messages, details of schemas.

    `since`: the first message to look for, where another text was found to hold those before. `write` gives the text
    of the beginning of the chat, None where the template writes no conversation that ends there. Reasoning may be
    missing from all but a last answer, as templates drop it from earlier turns by design, and so may a text beside
    calls, which some take for reasoning, if it is written where the calls stand last; then it is among the names.
    Raises DataError for anything else that is not in the text.
    """
    unused = set() if since else _check_tools(chat.tools, text)
    at, called_at = 0, 0
    for number, message in enumerate(chat.messages[since:], start=since):
        role = message["role"]
        # Some write an answer's text behind what the tools said to its calls.
        begin = {"tool": called_at, **dict.fromkeys(_FIRST, 0)}.get(role, at)
        is_last = number == len(chat.messages) - 1
        replies_from = None
        if not is_last and role == "assistant" and chat.messages[number + 1]["role"] == "tool":
            replies_from = _check_alone(chat.with_messages(chat.messages[: number + 1]), text, begin, write)
        if replies_from is not None and message.get("tool_calls"):
            end = _check_calls(message, text, begin)
        else:
            end = _check_message(message, text, begin, thoughts=is_last)
        if not is_last and role == "assistant" and any(_find(t, text, begin) is None for t in _said(message)):
            unused.add("messages[] thoughts of an answer before the last")
        if role == "assistant":
            called_at = begin if replies_from is None else replies_from
        at = at if role in _FIRST else max(at, end)
        unused |= {f"messages[].{name}" for name, value in _links(message) if _find(value, text) is None}
    return unused


def _check_alone(chat: Chat, text: str, begin: int, write: Callable[[Chat], str | None]) -> int | None:
    """Where in `text` the replies to the last answer of `chat` may begin: its calls stand before them.

    None where the template writes no such chat. Raises DataError for a piece of the answer that is not in the text that
    ends with it: in the whole text it may have been found in a reply.
    """
    alone = write(chat)
    if alone is None:
        return None
    message, common = chat.messages[-1], common_length(alone, text)
    _check_message(message, alone, min(begin, common), thoughts=False)
    if common < begin:
        return begin  # the text goes on otherwise before the answer begins, so its places say nothing here
    # Up to the calls only: some templates write an answer's text behind the replies, which may begin like it.
    return max(begin, min(common, _check_calls(message, alone, begin)))


def _check_message(message: Message, text: str, begin: int, *, thoughts: bool) -> int:
    """Where the last piece of the message ends. Raises DataError for a piece that is not in `text[begin:]`."""
    end = begin
    thought, said = _spoken(message) if message["role"] == "assistant" else ([], _contents(message))
    for piece in said:
        end = max(end, _demand(piece, text, begin, "the text", message))
    for piece in thought if thoughts else ():
        end = max(end, _demand(piece, text, begin, "the reasoning", message))
    return max(end, _check_calls(message, text, begin))


def _check_calls(message: Message, text: str, begin: int) -> int:
    end = begin
    for call in message.get("tool_calls") or ():
        for piece in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
            end = max(end, _demand(piece, text, begin, "the tool calls", message))
    return end


def _demand(piece: str, text: str, begin: int, what: str, message: Message) -> int:
    """The end of the piece in the text."""
    found = _find(piece, text, begin)
    if found is None:
        advice = "set data.chat_template to one that writes it, or remove it from the rows"
        if what == "the reasoning":
            name = next((name for name in REASONING if name in message), None)
            advice = f"it may read another key than {name!r} ({', '.join(REASONING)}): rename it, or {advice}" if (
                name) else advice  # fmt: skip
        raise DataError(
            f"this chat template drops {what} of the {message['role']}'s message ({piece.strip()[:_SHORT]!r} is not "
            f"where it should be in its text); {advice}"
        )
    return found


def _find(piece: str, text: str, begin: int = 0) -> int | None:
    """Where the first occurrence of a piece ends, in any form that templates write; None: nowhere."""
    piece = piece.strip()
    if not piece:
        return begin
    forms = {piece}
    if not (piece.isascii() and piece.isprintable() and '"' not in piece and "\\" not in piece and "'" not in piece):
        forms.update(_escaped(piece))
    ends = [at + len(form) for form in forms if (at := text.find(form, begin)) >= 0]
    return min(ends) if ends else None


def _escaped(piece: str) -> Iterator[str]:
    for ascii_only in (False, True):
        once = json.dumps(piece, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
    yield repr(piece)[1:-1]


def _contents(message: Message) -> list[str]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [content or ""]
    return [part["text"] for part in content]


def _spoken(message: Message) -> tuple[list[str], list[str]]:
    """(thoughts, the rest) of an answer: what stands before `</think>` is a thought, whichever key it stands in."""
    thoughts = [message[name] for name in REASONING if name in message][:1]
    said = []
    for content in _contents(message):
        before, closed, after = content.rpartition("</think>")
        thoughts += _THOUGHT.split(before) if closed else []
        said += _THOUGHT.split(after)
    return thoughts, said


def _said(message: Message) -> list[str]:
    """What calls may lose once something follows them: thoughts, and the text beside them."""
    thoughts, said = _spoken(message)
    return [*thoughts, *(said if message.get("tool_calls") else ())]


def _leaves(value: Any) -> Iterator[str]:
    """Keys, texts and numbers of a JSON value; true, false and null have too many spellings to look for."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _links(message: Message) -> Iterator[tuple[str, str]]:
    for name in ("name", "tool_call_id"):
        if name in message:
            yield name, message[name]
    for call in message.get("tool_calls") or ():
        if isinstance(call.get("id"), str):
            yield "tool_calls[].id", call["id"]


def _check_tools(tools: Sequence[Mapping[str, Any]], text: str) -> set[str]:
    """What of the schemas' details is not in the text. Raises DataError where a tool itself is not."""
    unused = set()
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping):
            continue  # a tool that is built into the model
        for key in ("name", "description"):
            piece = function.get(key)
            if isinstance(piece, str) and _find(piece, text) is None:
                raise DataError(
                    f"this chat template drops the tools ({piece.strip()[:_SHORT]!r}, the {key} of one, is not in its "
                    "text); set data.chat_template to one that writes them, or remove the column 'tools'"
                )
        unused |= {
            f"tools[].{key}"
            for key, value in function.items()
            if key not in ("name", "description", "strict")
            if any(_find(piece, text) is None for piece in _details(value))
        }
    return unused


def _details(value: Any, key: str = "") -> Iterator[str]:
    """The words of a schema that somebody wrote: names of parameters, descriptions, allowed values."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if key == "properties":
                yield name
            yield from _details(inner, name)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _details(inner, key)
    elif isinstance(value, str) and key in ("description", "enum", "required", "const", "title"):
        yield value
