"""OpenAssistant's message rows (Koepf et al., "OpenAssistant Conversations", 2023) as ordinary rows.

There a row is one message, which names the message it answers. Together they form trees: a prompt, several answers to
it that people have ranked, several replies to each of them. A stage behind the readers makes rows of them:

    messages   one conversation a tree: the best-ranked path, up to its last answer
    ranked     one ranking for each prompt that has two or more ranked answers, under the conversation so far
    prompt     each message of a prompter, under the conversation so far

Deleted messages and those that reviewers refused are left out, with all that follows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

from rlhf_ray.data.text_files import Found
from rlhf_ray.errors import DataError

TreeForm = Literal["messages", "ranked", "prompt"]

# Reasons, as reports name them.
DELETED, REFUSED, UNRANKED = "deleted message", "message that reviewers refused", "answer without a rank"
EQUAL, ALONE = "answer ranked like another", "prompt without two ranked answers"
UNANSWERED = "tree without an answer"
_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(eq=False)
class _Message:
    where: str
    id: str
    parent_id: str | None
    role: str
    text: str
    rank: float | None
    refusal: str | None  # the reason to leave it out
    parent: _Message | None = None
    replies: list[_Message] = field(default_factory=list)

    def so_far(self) -> list[dict[str, str]]:
        """The conversation from the root to this message."""
        path, message = [], self
        while message is not None:
            path.append({"role": _ROLES[message.role], "content": message.text})
            message = message.parent
        return path[::-1]

    def best_reply(self) -> _Message | None:
        """The one of the lowest rank; those without a rank come last, and of equals the first in the file."""
        return min(self.replies, key=lambda reply: (reply.rank is None, reply.rank or 0), default=None)


def assembled(found: Iterator[Found], form: TreeForm | None, dropped: Counter[str]) -> Iterator[Found]:
    """The rows, those of a tree file in the given form; `where` is the line of the last message of a prompt, and of a
    conversation that of its root. `dropped` counts what is left out, by reason.
    """
    first = next(found, None)
    if first is None:
        return
    rows = chain([first], found)
    if form is None or isinstance(first, DataError) or not _is_message(first[1]):
        yield from rows
        return
    messages: dict[str, _Message] = {}
    for item in rows:
        try:
            for message in [] if isinstance(item, DataError) else _messages_of(*item):
                if message.id in messages:
                    raise DataError(
                        f"{message.where}: message_id {message.id!r} is that of {messages[message.id].where} too; "
                        "give each message its own"
                    )
                messages[message.id] = message
        except DataError as error:
            item = error
        if isinstance(item, DataError):
            yield item
    yield from _rows(messages, form, dropped)


def tree_form(data_type: str, default: TreeForm) -> TreeForm:
    """What `data.type` asks for, or what a command reads."""
    return next((form for form in get_args(TreeForm) if form == data_type), default)


def _is_message(fields: dict[str, Any]) -> bool:
    """A row of the flat export, or a whole tree under `prompt` with its `replies`."""
    inner = fields.get("prompt")
    if "message_tree_id" in fields and isinstance(inner, dict):
        return True
    if not {"message_id", "text", "role"} <= set(fields):
        return False
    # A role that is no text says nothing of the file; with a parent it is a message, of which that is complained.
    return fields["role"] in _ROLES if isinstance(fields["role"], str) else "parent_id" in fields


def _messages_of(where: str, fields: dict[str, Any]) -> Iterator[_Message]:
    if "text" in fields or not isinstance(fields.get("prompt"), dict):
        yield _message(where, fields, fields.get("parent_id"))
        return
    waiting: list[tuple[Any, str | None]] = [(fields["prompt"], None)]
    while waiting:
        nested, parent = waiting.pop()
        if not isinstance(nested, dict) or not isinstance(nested.get("replies") or [], list):
            raise DataError(f"{where}: a message of the tree is no object with a list of replies; mend the row")
        message = _message(where, nested, parent)
        yield message
        # The last goes on the stack first, so that messages come in their order.
        waiting += [(reply, message.id) for reply in reversed(nested.get("replies") or [])]


def _message(where: str, fields: dict[str, Any], parent: Any) -> _Message:
    name, role, text, rank = (fields.get(key) for key in ("message_id", "role", "text", "rank"))
    if not isinstance(name, str) or not isinstance(text, str) or not (parent is None or isinstance(parent, str)):
        raise DataError(f"{where}: a message needs the texts message_id and text, and a parent_id if it is a reply")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: the role of message {name!r} is {role!r}; it must be prompter or assistant")
    if isinstance(rank, bool) or not (rank is None or isinstance(rank, (int, float))) or rank != rank:
        raise DataError(f"{where}: the rank of message {name!r} is {rank!r}, not a number (0: the best)")
    refusal = DELETED if fields.get("deleted") else REFUSED if fields.get("review_result") is False else None
    return _Message(where, name, parent or None, role, text, rank, refusal)


def _rows(messages: dict[str, _Message], form: TreeForm, dropped: Counter[str]) -> Iterator[Found]:
    roots, orphans = [], []
    for message in messages.values():
        if message.parent_id is None:
            roots.append(message)
        elif message.parent_id in messages:
            message.parent = messages[message.parent_id]
            message.parent.replies.append(message)
        else:
            orphans.append(message)
            yield DataError(
                f"{message.where}: its parent_id {message.parent_id!r} is no message of this file; add that message, "
                "or remove this one and those that follow it"
            )
    reached = {message for orphan in orphans for message in _walk(orphan)}
    for root in roots:
        tree = list(_walk(root))
        reached.update(tree)
        problems = [problem for message in tree if (problem := _problem(message)) is not None]
        yield from problems
        if not problems:
            yield from _rows_of_tree(root, _usable(tree, dropped), form, dropped)
    if circle := next((message for message in messages.values() if message not in reached), None):
        yield DataError(f"{circle.where}: the message follows from itself, by parent_id; mend it")


def _walk(root: _Message) -> Iterator[_Message]:
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        waiting += reversed(message.replies)


def _problem(message: _Message) -> DataError | None:
    expected = "prompter" if message.parent is None or message.parent.role == "assistant" else "assistant"
    if message.role == expected:
        return None
    return DataError(f"{message.where}: the message is of the {message.role}, and here the {expected} speaks; mend it")


def _usable(tree: Sequence[_Message], dropped: Counter[str]) -> list[_Message]:
    """Without refused messages and all below them, which are cut off their parents."""
    left = set()
    for message in tree:  # parents first
        if message.refusal is None and message.parent in left:
            message.refusal = message.parent.refusal
        if message.refusal is not None:
            dropped[message.refusal] += 1
            left.add(message)
    kept = [message for message in tree if message not in left]
    for message in kept:
        message.replies = [reply for reply in message.replies if reply not in left]
    return kept


def _rows_of_tree(
    root: _Message, tree: Sequence[_Message], form: TreeForm, dropped: Counter[str]
) -> Iterator[Found]:
    if form == "messages":
        last, message = None, root if tree else None
        while message is not None:
            last = message if message.role == "assistant" else last
            message = message.best_reply()
        if last is not None:
            yield root.where, {"messages": last.so_far()}
        elif tree:
            dropped[UNANSWERED] += 1
        return
    for message in tree:
        if message.role != "prompter":
            continue
        if form == "prompt":
            yield message.where, {"prompt": message.so_far()}
        elif len(answers := _ranked(message.replies, dropped)) > 1:
            yield message.where, {"prompt": message.so_far(), "completions": [answer.text for answer in answers]}
        else:
            dropped[ALONE] += 1


def _ranked(replies: Sequence[_Message], dropped: Counter[str]) -> list[_Message]:
    """Best first. Only ranked ones, and one of each rank, for neither of two equals is better."""
    if len(replies) < 2:
        return []
    ranks: dict[float, _Message] = {}
    for reply in replies:
        if reply.rank is None:
            dropped[UNRANKED] += 1
        elif ranks.setdefault(reply.rank, reply) is not reply:
            dropped[EQUAL] += 1
    return [ranks[rank] for rank in sorted(ranks)]
