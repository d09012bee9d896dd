"""A conversation with a model on the terminal, for `rlhf-ray generate`."""

from __future__ import annotations

import re
from collections.abc import Callable

from rlhf_ray.commands.generate.writer import OnText, Writer
from rlhf_ray.data.chat import Chat, Messages
from rlhf_ray.errors import DataError, Terminated

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"

Read = Callable[[], str | None]  # a line, or None at the end


def chat(writer: Writer, read: Read, write: OnText, say: OnText) -> None:
    """Answer line after line until there is no more, each after all that was said before; `say`: what is no answer.

    A model without a chat template knows no turns: it goes on with each line by itself.
    """
    history: Messages = ()
    turn = 0
    while (line := read()) is not None:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            history, turn = (), 0
            say("the conversation is forgotten")
        elif re.fullmatch(r"/[a-z]+", line):
            say(f"there is no command {line}; {COMMANDS}")
        elif line:
            asked = (*history, {"role": "user", "content": line})
            answer = _answer(writer, asked if writer.chats else line, turn, write, say)
            if answer:
                history, turn = (*asked, {"role": "assistant", "content": answer}), turn + 1


def _answer(writer: Writer, asked: Messages | str, turn: int, write: OnText, say: OnText) -> str:
    """What the model has written; also where it was interrupted. Empty: the question counts as not asked."""
    try:
        if isinstance(asked, str):
            ids = writer.encode(asked, "the line")
        else:
            ids = writer.encode(Chat(asked), "the conversation")
    except DataError as error:  # too long, or refused by the template
        say(f"{error}; /reset begins a new conversation")
        return ""
    live = writer.live(ids, write)
    try:
        reason = writer.answer(ids, turn, live).finish_reason
    except Terminated:
        raise
    except KeyboardInterrupt:
        reason = "interrupted"
    write("\n")
    if reason != "stop":
        say(f"({'stopped' if reason == 'interrupted' else writer.cut_off})")
    return live.text
