"""Templates: from prompts, answers and conversations to pieces of text, cut where an answer begins and ends.

A piece is tokenized by itself (data/encoding.py). So the prompt of a training sequence is cut exactly where the
generator's prompt ends, and its tokens are the ones that the generator will see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.chat import Chat, Message
from rlhf_ray.data.rendering import Renderer, Span, joined_parts
from rlhf_ray.errors import DataError

# Taori et al., "Stanford Alpaca: An Instruction-following LLaMA model", 2023; the answer begins on a line of its own.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# Needs no special token but EOS, so that every tokenizer can read it.
CHAT_TEMPLATES = {
    "zephyr": (
        "{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        "{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}{{- '\\n' }}"
        "{%- else %}{{- message['content'] + eos_token + '\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
    )
}


@dataclass(frozen=True)
class Piece:
    """Text that is tokenized by itself. The tokens that lie in its `learned` spans, in part at least, are learned."""

    text: str
    learned: tuple[Span, ...] = ()

    @classmethod
    def answer(cls, text: str) -> Piece:
        """All of it is learned."""
        return cls(text, ((0, len(text)),))


@dataclass(frozen=True)
class _Turn:
    """An answer in a rendered conversation lies in [prompt_end, end); `marks` are what is learned of it."""

    prompt_end: int
    end: int
    marks: tuple[Span, ...]


def alpaca_prompt(instruction: str, given: str = "") -> str:
    if given:
        return _ALPACA_WITH_INPUT.format(instruction=instruction, input=given)
    return _ALPACA.format(instruction=instruction)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Give the tokenizer a chat template (in place: it is saved with the model that learns it); None: its own.

    `chat_template` is a file, or a name of CHAT_TEMPLATES. Raises DataError for a file that is missing.
    """
    if chat_template is None:
        return
    if chat_template in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[chat_template]
        return
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise DataError(
            f"data.chat_template={chat_template}: no such file; give a .jinja file, or one of "
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")


class ChatTemplate:
    """A tokenizer's chat template, and where in its text the assistant's answers are.

    Learned of an answer is what the template puts between `{% generation %}` marks, if it has them. Else it is what
    the conversation up to the answer has more than the prompt before it (the text with the generation prompt), up to
    EOS if that is in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any]):
        self._render = Renderer(tokenizer, args)
        self._eos = tokenizer.eos_token

    def prompt(self, chat: Chat) -> list[Piece]:
        """Pieces of what the generator sees; earlier answers are pieces of their own, as they are in training."""
        text, marks = self._render(chat, ask=True)
        return _cut(text, self._turns(chat, text, marks), learned=())

    def conversation(self, chat: Chat, learned: Sequence[int]) -> list[list[Piece]]:
        """Sequences in which the answers at the positions `learned` of the messages are learned, one after another.

        One sequence, if the template writes each turn in the same way whatever follows it. Templates that leave the
        reasoning out of earlier turns do not: then each answer has a sequence of its own, after the very prompt that
        the generator would get. Raises DataError where the answer does not begin where that prompt ends.
        """
        text, marks = self._render(chat)
        turns = self._turns(chat, text, marks)
        if all(i in turns for i in learned):
            for i in learned:
                _check_written(chat.messages[i], text[turns[i].prompt_end : turns[i].end])
            end = turns[max(learned)].end
            return [_cut(text[:end], {i: turn for i, turn in turns.items() if turn.end <= end}, learned)]
        if list(learned) == [len(chat.messages) - 1]:
            raise DataError(
                "the text that the chat template writes with add_generation_prompt is not the beginning of its text "
                "with the answer (or it marks no answer with {% generation %}), so a model would learn after a prompt "
                "that it never gets; set data.chat_template_args (such as enable_thinking: false) or data.chat_template"
            )
        return [self.conversation(_until(chat, i + 1), [i])[0] for i in learned]

    def _turns(self, chat: Chat, text: str, marks: Sequence[Span]) -> dict[int, _Turn]:
        """The answers whose place in `text` can be told, by position in the messages.

        It depends on what stands before an answer only, so an answer in a prompt and in training has the same place.
        """
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
        prompts = [self._render(_until(chat, i), ask=True)[0] for i in answers]
        limits = [*map(len, prompts), len(text)][1:]
        has_marks = self._render.has_marks(chat)
        turns = {}
        for i, prompt, limit in zip(answers, prompts, limits, strict=True):
            start = len(prompt)
            if has_marks:
                own = tuple(mark for mark in marks if start < mark[1] <= limit)
            else:
                end = self._end_of_answer(_until(chat, i + 1), text, start)
                own = ((start, end),) if end > start else ()
            if own and text.startswith(prompt):
                turns[i] = _Turn(start, own[-1][1], own)
        return turns

    def _end_of_answer(self, chat: Chat, text: str, start: int) -> int:
        """Where the last message's answer ends in `text`; -1 where `text` does not begin with this conversation."""
        whole, _ = self._render(chat)
        if not text.startswith(whole):
            return -1
        # What stands after EOS is written by the template, not by the generator: it has stopped there.
        eos = whole.rfind(self._eos, start)
        return eos + len(self._eos) if eos >= 0 else len(whole)


def _until(chat: Chat, end: int) -> Chat:
    """The first `end` messages."""
    return chat.with_messages(chat.messages[:end])


def _cut(text: str, turns: Mapping[int, _Turn], learned: Sequence[int]) -> list[Piece]:
    """The pieces of `text`: before, between, in and after its answers; those in `learned` are learned."""
    pieces, at = [], 0
    for i, turn in turns.items():
        # Marks may begin inside the generation prompt (`<|im_start|>assistant{% generation %}\n`).
        for begin, end in ((at, turn.prompt_end), (turn.prompt_end, turn.end)):
            inside = [(max(b, begin) - begin, min(e, end) - begin) for b, e in turn.marks if b < end and e > begin]
            pieces.append(Piece(text[begin:end], tuple(inside) if i in learned else ()))
        at = turn.end
    return [piece for piece in [*pieces, Piece(text[at:])] if piece.text]


def _check_written(message: Message, text: str) -> None:
    """A template for lists of parts drops a plain text without a word, and an empty answer would be learned."""
    content = message.get("content") or ""
    content = content if isinstance(content, str) else joined_parts(content)
    said = content.rpartition("</think>")[2].strip()
    if said not in text:
        raise DataError(
            f"the chat template does not write the answer's text ({said[:40]!r} is not in {text[:40]!r}); is it one "
            "for images? Set data.chat_template to one for text"
        )
