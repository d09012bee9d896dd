"""Templates: from prompts, answers and conversations to pieces of text, cut where an answer begins and ends.

A piece is tokenized by itself (data/encoding.py). So the prompt of a training sequence is cut exactly where the
generator's prompt ends, and its tokens are the ones that the generator will see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

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
    """Text that is tokenized by itself. Its tokens from character `learned_from` on are learned; None: none is."""

    text: str
    learned_from: int | None = None


@dataclass(frozen=True)
class _Turn:
    """Where an answer lies in a rendered conversation: [prompt_end, end); the template marks it from `marked` on."""

    prompt_end: int
    end: int
    marked: int


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

    Answers lie between `{% generation %}` marks if the template has them. Else an answer is what the conversation up
    to it has more than its prompt (rendered with the generation prompt), up to EOS if that is in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise DataError(
                "these are chat messages, but the tokenizer has no chat template; use an instruction-tuned model, or "
                "set data.chat_template to a .jinja file or to zephyr"
            )
        self._template = tokenizer.get_chat_template()
        self._special = tokenizer.special_tokens_map
        self._eos = tokenizer.eos_token
        self._has_marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """Pieces of what the generator sees; earlier answers are pieces of their own, as they are in training."""
        text, marks = self._render(messages, ask=True)
        turns = [turn for turn in self._turns(messages, text, marks) if turn is not None]
        return _cut(text, turns, learned=())

    def conversation(self, messages: Sequence[Mapping[str, Any]], learned: Sequence[int]) -> list[list[Piece]]:
        """Sequences in which the answers at the positions `learned` of `messages` are learned, one after another.

        One sequence, if the template writes each turn in the same way whatever follows it. Templates that leave the
        reasoning out of earlier turns do not: then each answer has a sequence of its own, after the very prompt that
        the generator would get.
        """
        text, marks = self._render(messages)
        turns = self._turns(messages, text, marks)
        if all(turns[i] is not None for i in learned):
            last = turns[max(learned)]
            return [_cut(text[: last.end], [t for t in turns if t and t.end <= last.end], [turns[i] for i in learned])]
        if len(messages) - 1 in learned and len(learned) == 1:
            raise DataError(
                "the chat template writes another prompt before a finished answer than when it asks for one, so a "
                "model would learn after tokens that it never sees; use a template whose text with "
                "add_generation_prompt is the beginning of its text with the answer"
            )
        return [self.conversation(messages[: i + 1], [i])[0] for i in learned]

    def _turns(
        self, messages: Sequence[Mapping[str, Any]], text: str, marks: Sequence[tuple[int, int]]
    ) -> list[_Turn | None]:
        """For every message: where its answer is in `text`; None where it is none or cannot be told."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._has_marks and len(marks) != len(answers):
            raise DataError(
                f"the chat template marks {len(marks)} answers with {{% generation %}}, but the conversation has "
                f"{len(answers)}; mend the template"
            )
        turns: list[_Turn | None] = [None] * len(messages)
        for number, i in enumerate(answers):
            if i == 0:
                continue  # nobody asked: there is no prompt before it
            prompt, _ = self._render(messages[:i], ask=True)
            start = len(prompt)
            if self._has_marks:
                begin, end = marks[number]
            else:
                end = self._end_of_answer(messages[: i + 1], text, start)
                begin = start
            if text.startswith(prompt) and start < end:
                turns[i] = _Turn(start, end, begin)
        return turns

    def _end_of_answer(self, messages: Sequence[Mapping[str, Any]], text: str, start: int) -> int:
        """Where the last message's answer ends in `text`; -1 where `text` does not begin with this conversation."""
        whole, _ = self._render(messages)
        if not text.startswith(whole):
            return -1
        # What stands after EOS is written by the template, not by the generator: it has stopped there.
        eos = whole.rfind(self._eos, start) if self._eos else -1
        return eos + len(self._eos) if eos >= 0 else len(whole)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False
    ) -> tuple[str, Sequence[tuple[int, int]]]:
        """(text, [begin, end) of each marked answer)."""
        try:
            texts, marks = render_jinja_template(
                [list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=self._has_marks,
                add_generation_prompt=ask,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation ({error}); mend the row") from error
        return texts[0], marks[0] if self._has_marks else ()


def _cut(text: str, turns: Sequence[_Turn], learned: Sequence[_Turn | None]) -> list[Piece]:
    """The pieces of `text`: before, between, in and after its answers; those in `learned` are learned."""
    pieces, at = [], 0
    for turn in turns:
        is_learned = turn in learned
        # Marks may begin inside the generation prompt (`<|im_start|>assistant{% generation %}\n`): learned as marked.
        early = turn.marked - at if is_learned and turn.marked < turn.prompt_end else None
        pieces.append(Piece(text[at : turn.prompt_end], early))
        late = max(turn.marked - turn.prompt_end, 0)
        pieces.append(Piece(text[turn.prompt_end : turn.end], late if is_learned else None))
        at = turn.end
    return [piece for piece in [*pieces, Piece(text[at:])] if piece.text]
