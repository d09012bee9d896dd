"""A conversation as the text that a tokenizer's chat template makes of it.

The same as `tokenizer.apply_chat_template(messages, tools=...)`, but for three things that templates write in two
ways. Each is found out once, by a small conversation that the template renders: whether it wants the arguments of a
tool call as an object or as JSON text, lists of content parts or plain text, and null content or an empty text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_ray.data.chat import Chat, Message
from rlhf_ray.errors import DataError

Span: TypeAlias = tuple[int, int]  # [begin, end) in characters

# What a message says to us, not to the model.
_OURS = ("weight",)
_KEY, _TEXT = "probe_key", "probe-text"
_ARGUMENTS = {_KEY: "value"}
_QUESTION: Message = {"role": "user", "content": "question"}
THINK, _CLOSED = "<think>", "</think>"


class Renderer:
    """A tokenizer's chat template with its variables; `args` are those of the settings, a chat's own go before them.

    Raises DataError for a tokenizer without a template, and for conversations that the template refuses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any]):
        if not tokenizer.chat_template:
            raise DataError(
                "these are chat messages, but the tokenizer has no chat template; use an instruction-tuned model, or "
                "set data.chat_template to a .jinja file or to zephyr"
            )
        self._tokenizer = tokenizer
        self._variables = {**tokenizer.special_tokens_map, **args}

    def __call__(self, chat: Chat, *, ask: bool = False, finished: bool = False) -> tuple[str, Sequence[Span]]:
        """(text, the spans that the template marks with `{% generation %}`); `ask`: with the generation prompt.

        A chat to be asked about whose last message is the assistant's is not finished: its text ends where that
        message's content ends, as `continue_final_message` has it. `finished`: it is, and the assistant speaks again.
        """
        chat = self._adapted(chat)
        last = chat.messages[-1]
        goes_on = ask and not finished and last["role"] == "assistant"
        if goes_on and str(last.get("content")).lstrip().startswith(THINK):
            return self._with_begun_thought(chat), ()
        return self._render(chat, ask=ask, goes_on=goes_on)

    def has_marks(self, chat: Chat) -> bool:
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template(chat)))

    def _template(self, chat: Chat) -> str:
        """A tokenizer may have one template of several for conversations with tools."""
        return self._tokenizer.get_chat_template(tools=chat.tools or None)

    def _render(self, chat: Chat, *, ask: bool = False, goes_on: bool = False) -> tuple[str, Sequence[Span]]:
        marked = self.has_marks(chat) and not goes_on
        try:
            texts, marks = render_jinja_template(
                [list(chat.messages)],
                tools=list(chat.tools) or None,
                chat_template=self._template(chat),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask and not goes_on,
                continue_final_message=goes_on,
                **{**self._variables, **(chat.template_args or {})},
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is no Jinja (line {error.lineno}: {error.message}); mend it, or set "
                "data.chat_template to another"
            ) from error
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise DataError(
                f"the chat template refuses the conversation ({error}); mend the row, or the template"
            ) from error
        return texts[0], [span for span in marks[0] if span[0] < span[1]] if marked else ()

    def _with_begun_thought(self, chat: Chat) -> str:
        """A chat whose last message begins with a thought, which ends there or goes on.

        Templates that put thoughts where they belong, or drop them, take a thought that is not closed for the answer
        and write an empty one before it, and do not find a closed one again. There it stands as the model writes it.
        """
        content = chat.messages[-1]["content"]
        try:
            text, _ = self._render(chat, ask=True, goes_on=True)
            if not text[: text.rfind(THINK)].rstrip().endswith(_CLOSED):
                return text
        except DataError:
            pass
        prompt, _ = self._render(chat.with_messages(chat.messages[:-1]), ask=True)
        return prompt + without_opening(content, prompt)

    # ---- what the template can read ------------------------------------------------------------------------

    def _adapted(self, chat: Chat) -> Chat:
        return chat.with_messages(tuple(self._message(message) for message in chat.messages))

    def _message(self, message: Message) -> Message:
        changed = {key: value for key, value in message.items() if key not in _OURS}
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, (list, tuple)) and not self._reads_parts(message["role"]):
            changed["content"] = joined_parts(content)
        if calls and content is None and "content" in message and not self._reads_null:
            changed["content"] = ""
        if calls and self._wants_json_text:
            changed["tool_calls"] = [_with_json_text(call) for call in calls]
        return changed

    @functools.cached_property
    def _wants_json_text(self) -> bool:
        """Whether the arguments of a call must be text: given an object, the template fails or writes Python."""
        for content in ("", None):
            as_object = self._attempt(_QUESTION, _called(_ARGUMENTS, content))
            if as_object is not None and _KEY in as_object:
                return repr(_ARGUMENTS) in as_object
            as_text = self._attempt(_QUESTION, _called(json.dumps(_ARGUMENTS), content))
            if as_text is not None and _KEY in as_text:
                return True
        return False

    @functools.cached_property
    def _reads_null(self) -> bool:
        """Whether null content beside a call is read; else the template fails, or writes Python's None."""
        arguments = json.dumps(_ARGUMENTS) if self._wants_json_text else _ARGUMENTS
        null, empty = (self._attempt(_QUESTION, _called(arguments, content)) for content in (None, ""))
        return empty is None or (null is not None and ("None" not in null or _KEY not in empty))

    @functools.cache  # noqa: B019 - one renderer an encoder
    def _reads_parts(self, role: str) -> bool:
        """Whether a list of parts is read in messages of this role; else the template drops it or writes Python."""
        message = {"role": role, "content": [{"type": "text", "text": _TEXT}]}
        before = {"system": [], "user": []}.get(role, [_QUESTION])
        after = [_QUESTION] if role == "system" else []
        text = self._attempt(*before, message, *after)
        return text is not None and _TEXT in text and "'text'" not in text

    def _attempt(self, *messages: Message) -> str | None:
        """The text of a conversation, None where the template refuses it."""
        try:
            return self._render(Chat(messages))[0]
        except DataError:
            return None


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike; os.path.commonprefix takes them one by one, far too long here."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[low:middle], low) else (low, middle - 1)
    return low


def without_opening(content: str, prompt: str) -> str:
    """An answer without its beginning, if that stands at the end of the prompt already: `<think>`, opened there."""
    opened = next((n for n in range(len(content), 0, -1) if prompt.endswith(content[:n])), 0)
    return content[opened:]


def _called(arguments: Any, content: str | None = "") -> Message:
    """An assistant's message that calls a tool."""
    function = {"name": "probe_tool", "arguments": arguments}
    # Some templates want ids of nine letters or digits.
    call = {"type": "function", "id": "probe0001", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def joined_parts(parts: Sequence[Any]) -> str:
    """The text of a list of content parts. Raises DataError for a part that is none."""
    texts = [part if isinstance(part, str) else part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("the chat template reads text only, and a message holds a part that is none; remove the row")
    return "".join(texts)


def _with_json_text(call: Any) -> Any:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        return call
    written = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written
