"""What a model is asked: a text, a conversation as a chat template gets it, or an instruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True)
class Chat:
    """Messages, and what a row gives the template beside them: the tools' JSON schemas, and variables of its own."""

    messages: Messages
    tools: tuple[Mapping[str, Any], ...] = ()
    template_args: Mapping[str, Any] | None = None

    def with_messages(self, messages: Messages) -> Chat:
        """The same tools and variables around other messages."""
        return replace(self, messages=messages)


@dataclass(frozen=True)
class Instruction:
    """What an instruction template fills in; `input` may be empty."""

    instruction: str
    input: str = ""


Prompt: TypeAlias = str | Chat | Instruction
