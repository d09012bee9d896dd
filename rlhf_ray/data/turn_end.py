"""What ends an assistant's turn: one notion of it for masks, given answers, stop tokens, reward models and classifiers.

It is found out from the chat template, by two small conversations: one that ends with the assistant's message, and one
that goes on. A special token that both have behind the message ends the turn (`<|im_end|>`, `<|eot_id|>`,
`<end_of_turn>`, `</s>`). If they have none in common, it is the one that ends the whole conversation (`<|return|>`); if
there is none either, the marker of the next role that stands right behind the message (GLM's `<|user|>` and, behind a
call, `<|observation|>`). Else nothing but the tokenizer's EOS ends a turn, and training adds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.chat import Chat, Message
from rlhf_ray.data.rendering import Renderer, common_length
from rlhf_ray.errors import DataError

_ANSWER, _VALUE, _TOOL = "probe-answer", "probe-value", "probe_tool"
_QUESTION: Message = {"role": "user", "content": "question"}
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A tool",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key"}}},
    },
}


@dataclass(frozen=True)
class TurnEnd:
    """The special token (as text) behind an answer, and the one behind a call of tools; empty: the tokenizer's EOS."""

    answer: str = ""
    call: str = ""

    def of(self, message: Message) -> str:
        return (self.call if message.get("tool_calls") else "") or self.answer


def end_of_turn(tokenizer: PreTrainedTokenizerBase, render: Renderer | None = None) -> TurnEnd:
    """What ends a turn under the tokenizer's chat template, which `render` applies."""
    special = special_pattern(tokenizer)
    if not tokenizer.chat_template or special is None:
        return TurnEnd()
    render = render or Renderer(tokenizer, {})
    return TurnEnd(_behind(_answers(), _ANSWER, render, special), _behind(_calls(), _VALUE, render, special))


def turn_end_ids(tokenizer: PreTrainedTokenizerBase, end: TurnEnd | None = None) -> tuple[int, ...]:
    """Ids of what ends a turn, the tokenizer's EOS first."""
    end = end_of_turn(tokenizer) if end is None else end
    written = [tokenizer.convert_tokens_to_ids(token) for token in (end.answer, end.call) if token]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *written]))


def with_turn_ends(stop: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer for the model (`models/loading.py`), and those that end a turn in its template."""
    return tuple(dict.fromkeys([*stop, *turn_end_ids(tokenizer)]))


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """The special tokens that can stand at the end of a turn; None where the tokenizer has none."""
    begins = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token}
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special and token.content not in begins}
    if not names:
        return None
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _behind(conversations: Iterator[tuple[Chat, Message]], text: str, render: Renderer, special: re.Pattern) -> str:
    """What ends the last turn of the first conversation that the template writes; `text` is the last of that turn."""
    for chat, following in conversations:
        try:
            whole, _ = render(chat)
            longer, _ = render(chat.with_messages((*chat.messages, following)))
        except DataError:
            continue
        if text in whole and text in longer:
            first = whole.find(text)
            end = _end(whole[whole.rfind(text) :], longer[longer.rfind(text) :], special)
            # What stands behind each of several calls does not end the turn.
            return end if whole.count(end, first) <= 1 else ""
    return ""


def _end(last: str, longer: str, special: re.Pattern) -> str:
    """Of the texts behind a turn that is the last one, and behind the same turn in a conversation that goes on."""
    common = common_length(last, longer)
    found = list(special.finditer(last))
    shared = [match for match in found if match.end() <= common]
    if shared or found:
        return (shared or found)[-1].group()
    if last[common:].strip():
        return ""
    marker = special.match(longer[common:].lstrip())
    return marker.group() if marker else ""


def _answers() -> Iterator[tuple[Chat, Message]]:
    said = {"role": "assistant", "content": _ANSWER}
    yield Chat((_QUESTION, said)), _QUESTION
    question, answer = ({**m, "content": [{"type": "text", "text": m["content"]}]} for m in (_QUESTION, said))
    yield Chat((question, answer)), question  # templates for images read nothing else


def _calls() -> Iterator[tuple[Chat, Message]]:
    # Some templates want ids of nine letters or digits, and some refuse two calls.
    calls = [_call(f"probe000{number}") for number in (1, 2)]
    result = {"role": "tool", "name": _TOOL, "tool_call_id": "probe0001", "content": "result"}
    for made in (calls, calls[:1]):
        for content in ("", None):
            yield Chat((_QUESTION, {"role": "assistant", "content": content, "tool_calls": made}), (_SCHEMA,)), result


def _call(name: str) -> dict[str, Any]:
    return {"type": "function", "id": name, "function": {"name": _TOOL, "arguments": {"key": _VALUE}}}
