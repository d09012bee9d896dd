"""Whether somebody has put a text through the chat template already: what that writes around messages stands in it.

It is found out by small conversations: what stands before each question, and what stands behind one whether its answer
follows or is to come (`<|start|>assistant`, `[/INST]`). A text is rendered if one of the two is in it and holds a token
of the tokenizer's own, for nobody writes those in a question. Words alone (`ASSISTANT:`) may be in any text: there both
must be, and the one before the answer at the end.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.chat import Chat, Message
from rlhf_ray.data.rendering import Renderer, common_length
from rlhf_ray.errors import DataError

_FIRST, _ANSWER, _SECOND = "probe-question", "probe-answer", "probe-again"


@dataclass(frozen=True)
class Around:
    """What a chat template writes before a question and before an answer; empty: nothing."""

    question: str = ""
    answer: str = ""
    telling: tuple[str, ...] = ()  # those that hold a token of the tokenizer's own

    def stands_in(self, text: str) -> bool:
        """Whether `text` has been through the template."""
        if any(marker in text for marker in self.telling):
            return True
        question, answer = self.question.strip(), self.answer.rstrip()
        return bool(question and answer.strip()) and question in text and text.rstrip().endswith(answer)


def around_messages(tokenizer: PreTrainedTokenizerBase) -> Around:
    """What the tokenizer's chat template writes around messages."""
    if not tokenizer.chat_template:
        return Around()
    render = Renderer(tokenizer, {})
    # Line breaks and blanks are tokens of their own in some (Gemma).
    own = frozenset(token for token in tokenizer.get_added_vocab() if token.strip())
    for question, answer, again in _talks():
        try:
            asked, _ = render(Chat((question,)), ask=True)
            told, _ = render(Chat((question, answer, again)), ask=True)
        except DataError:
            continue
        if _FIRST not in asked or not all(text in told for text in (_FIRST, _ANSWER, _SECOND)):
            continue
        before, _, after = asked.rpartition(_FIRST)
        between, _, rest = told.partition(_FIRST)[2].partition(_ANSWER)
        marker = _common_end(before, rest.partition(_SECOND)[0], own)
        for token in (tokenizer.bos_token, tokenizer.eos_token):
            marker = marker.strip().removeprefix(token or "").strip()  # a text may come without what begins it
        markers = marker, after[: common_length(after, between)]
        telling = own - {"<think>", "</think>"}  # a question may speak of thoughts
        return Around(*markers, tuple(marker for marker in markers if any(token in marker for token in telling)))
    return Around()


def _common_end(one: str, other: str, own: Iterable[str]) -> str:
    """Of two texts, cut where no token of the tokenizer's own is cut: `<bos>` and `<|end|>` end alike."""
    unit = re.compile("|".join([*map(re.escape, sorted(own, key=len, reverse=True)), "."]), re.DOTALL)
    both = [unit.findall(text)[::-1] for text in (one, other)]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False))
    return "".join([units[0] for units in shared][::-1])


def _talks() -> Iterator[tuple[Message, Message, Message]]:
    said = [
        {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
    ]  # fmt: skip
    yield tuple(said)
    yield tuple({**m, "content": [{"type": "text", "text": m["content"]}]} for m in said)  # templates for images
