"""Templates: from prompts, answers and conversations to pieces of text, cut where an answer begins and ends.

A piece is tokenized by itself (data/encoding.py). So the prompt of a training sequence is cut exactly where the
generator's prompt ends, and its tokens are the ones that the generator will see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.user_paths import is_file, typed_path
from rlhf_ray.data.chat import Chat, Message, Messages
from rlhf_ray.data.messages import REASONING
from rlhf_ray.data.rendering import THINK, Renderer, Span, common_length, without_opening
from rlhf_ray.data.turn_end import end_of_turn, special_pattern
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

_Marked: TypeAlias = tuple[str, list[Span]]


@dataclass(frozen=True)
class Piece:
    """Text that is tokenized by itself. The tokens that lie in its `learned` spans, in part at least, are learned."""

    text: str
    learned: tuple[Span, ...] = ()

    @classmethod
    def answer(cls, text: str) -> Piece:
        """All of it is learned."""
        return cls(text, ((0, len(text)),))


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
    path = typed_path(chat_template)
    if not is_file(path):
        raise DataError(
            f"data.chat_template={chat_template}: no such file; give a .jinja file, or one of "
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")


class ChatTemplate:
    """A tokenizer's chat template, and where in its text the assistant's answers are.

    Learned of an answer is what the template puts between `{% generation %}` marks, if it has them; else what the
    conversation up to the answer has more than the prompt before it (the text with the generation prompt). In either
    case what ends the turn is learned (data/turn_end.py): where it stands behind the marks they are extended, and where
    the template does not write it, it is added.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any]):
        self._render = Renderer(tokenizer, args)
        self.end = end_of_turn(tokenizer, self._render)
        self._special = special_pattern(tokenizer)
        self._eos = tokenizer.eos_token

    def text(self, chat: Chat) -> str | None:
        """A conversation as the template writes it; None where it refuses it."""
        try:
            return self._render(chat)[0]
        except DataError:
            return None

    def prompt(self, chat: Chat) -> list[Piece]:
        """Pieces of what the generator sees; earlier answers are pieces of their own, as they are in training."""
        text, _ = self._render(chat, ask=True)
        turns = {i: self._told(chat, i) for i in _answers(chat) if i < len(chat.messages) - 1}
        return _cut(text, _standing(turns, text, len(chat.messages)), learned=())

    def conversation(self, chat: Chat, learned: Sequence[int], begun: Message | None = None) -> list[list[Piece]]:
        """Sequences in which the answers at the positions `learned` of the messages are learned, one after another.

        One sequence, if the template writes each turn in the same way whatever follows it. Templates that leave the
        reasoning out of earlier turns do not, and templates that end no turn: then each answer has a sequence of its
        own, after the very prompt that the generator would get. `begun`: of the one learned answer, the part that
        stands in the prompt. Raises DataError where the answer does not begin where that prompt ends.
        """
        turns = {i: self._told(chat, i) for i in _answers(chat) if i <= max(learned) and i not in learned}
        turns = dict(sorted({**turns, **{i: self._turn(chat, i, begun) for i in learned}}.items()))
        if missing := [i for i in learned if turns[i] is None]:
            raise DataError(
                "the text that the chat template writes with add_generation_prompt is not the beginning of its text "
                f"with the answer (message {missing[0] + 1}), or it marks no answer with {{% generation %}}, so a "
                "model would learn after a prompt that it never gets; set data.chat_template_args (such as "
                "enable_thinking: false) or data.chat_template"
            )
        whole = turns[max(learned)].text
        if all(turns[i].stands_in(whole) for i in learned):
            return [_cut(whole, _standing(turns, whole, max(learned)), learned)]
        return [_cut(turns[i].text, _standing(turns, turns[i].text, i), [i]) for i in learned]

    def _told(self, chat: Chat, i: int) -> _Turn | None:
        """`_turn` of an answer that is not learned here: also None where the template ends no conversation with it."""
        try:
            return self._turn(chat, i)
        except DataError:
            return None

    def _turn(self, chat: Chat, i: int, begun: Message | None = None) -> _Turn | None:
        """Answer i as the last of its conversation, as the generator would have written it.

        None where its place in the text cannot be told. It depends on what stands before the answer only, so an answer
        in a prompt and in training has the same place.
        """
        end = self.end.of(chat.messages[i]) or self._eos
        before = chat.with_messages((*chat.messages[:i], *([begun] if begun else [])))
        prompt, _ = self._render(before, ask=True, finished=begun is None)
        placed = self._behind(prompt, chat.with_messages(chat.messages[: i + 1]), end, begun)
        if placed is None:
            return None
        (text, marks), start = placed, len(prompt)
        if len(text) <= start:
            return None
        stop, written = self._stop(text, start, end), None
        if stop < 0:  # nothing there stops the generator
            text, written = text + end, len(text)
            stop = len(text)
        if not self._render.has_marks(chat):
            return _Turn(start, stop, text[:stop], ((start, stop),), written)
        own = [mark for mark in marks if mark[0] < stop]
        if not own:
            return None
        begin, last = own[-1][0], max(own[-1][1], stop)
        return _Turn(start, last, text[:last], (*own[:-1], (begin, last)), written)

    def _behind(self, prompt: str, chat: Chat, end: str, begun: Message | None) -> _Marked | None:
        """(text, the marks of the answer) of a chat that ends with an answer, behind the prompt that it answers.

        `end` is what ends the turn. None where the two do not belong together.
        """
        message, (text, marks), start = chat.messages[-1], self._render(chat), len(prompt)
        if begun is not None:
            if not text.startswith(prompt):  # as the generator goes on: with nothing but the rest
                text = prompt + message["content"].removeprefix(begun["content"]) + end
                return text, [(start, len(text))]
            return text, [(max(mark[0], start), mark[1]) for mark in marks if mark[1] > start]
        if (thought := _left_out_thought(message, prompt, text)) is not None:
            text = prompt + thought + end
            return text, [(start, len(text))]
        if text.startswith(prompt):
            return text, [mark for mark in marks if mark[1] > start]
        return _behind_opened_thought(prompt, text, marks) or self._behind_earlier_thoughts(prompt, text, marks, chat)

    def _behind_earlier_thoughts(self, prompt: str, text: str, marks: Sequence[Span], chat: Chat) -> _Marked | None:
        """If only the prompt holds the thoughts that led to earlier calls, and the template drops them with the answer.

        It does (gpt-oss) if the text is the same for a chat without them; there the answer's place can be told.
        """
        for bare in _without_thoughts(chat.messages[:-1]):
            before = chat.with_messages(bare)
            if self.text(before.with_messages((*bare, chat.messages[-1]))) != text:
                continue
            shorter, _ = self._render(before, ask=True, finished=True)
            if text.startswith(shorter):
                shift = len(prompt) - len(shorter)
                return prompt + text[len(shorter) :], [(b + shift, e + shift) for b, e in marks if e > len(shorter)]
        return None

    def _stop(self, text: str, start: int, end: str) -> int:
        """Where what ends the turn ends in `text`, -1 where it is not there."""
        for token in (end, self._eos):
            if (at := text.rfind(token, start)) >= 0:
                return at + len(token)
        # A turn that ends in another way than most: there a special token stands last.
        last = [match.end() for match in self._special.finditer(text, start)] if self._special else []
        return last[-1] if last and last[-1] >= len(text.rstrip()) else -1


@dataclass(frozen=True)
class _Turn:
    """An answer in [prompt_end, end) of `text`, which ends with it; `marks` are what is learned of it."""

    prompt_end: int
    end: int
    text: str
    marks: tuple[Span, ...]
    written: int | None = None  # where the answer ends for the template, if what ends the turn was added behind that

    def stands_in(self, text: str) -> bool:
        """Whether a longer conversation is written as this one goes on."""
        return text.startswith(self.text)

    def without_added_end(self) -> _Turn:
        end = self.end if self.written is None else self.written
        return _Turn(self.prompt_end, end, self.text[:end], self.marks)


def _answers(chat: Chat) -> list[int]:
    return [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]


def _standing(turns: Mapping[int, _Turn | None], text: str, last: int) -> dict[int, _Turn]:
    """The turns up to `last` that are written in `text` as they would be at its end."""
    told = {i: turn for i, turn in turns.items() if i <= last and turn is not None}
    placed = {i: turn if turn.stands_in(text) else turn.without_added_end() for i, turn in told.items()}
    return {i: turn for i, turn in placed.items() if turn.stands_in(text)}


def _left_out_thought(message: Message, prompt: str, text: str) -> str | None:
    """What the model writes after the prompt, if the template leaves the thought out of the last answer too."""
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if not isinstance(content, str) or message.get("tool_calls"):
        return None
    if isinstance(reasoning, str) and prompt.rstrip().endswith(THINK):
        content = f"{THINK}\n{reasoning}\n</think>\n\n{content}"
    thought = content.rpartition("</think>")[0].removeprefix(THINK).strip()
    if not thought or thought in text[common_length(prompt, text) :]:
        return None
    return without_opening(content, prompt)


def _without_thoughts(messages: Messages) -> Iterator[Messages]:
    """Messages without their reasoning, and without the text beside calls, which gpt-oss takes for reasoning too."""
    bare = tuple({key: value for key, value in m.items() if key not in REASONING} for m in messages)
    yield bare
    yield tuple({**m, "content": ""} if m.get("tool_calls") else m for m in bare)


def _behind_opened_thought(prompt: str, text: str, marks: Sequence[Span]) -> _Marked | None:
    """(text, the answer's marks) with the answer of `text` behind `prompt`, if they differ in an opened thought only.

    Such a prompt ends with `<think>` and a line break, and the template writes an answer without a thought after
    another (or none): the generator would get that prompt and go on with the rest.
    """
    opened = prompt.rfind(THINK)
    if opened < 0 or not text.startswith(prompt[:opened]):
        return None
    if prompt[opened + len(THINK) :].replace("</think>", "").strip():
        return None  # the thought of an earlier answer, not of this one
    # Not in the middle of a token: `<think>` and `<|im_end|>` begin alike.
    common = common_length(prompt, text) if text.startswith(THINK, opened) else opened
    shift, own = len(prompt) - common, [mark for mark in marks if mark[1] > common]
    moved = [(b, common) for b, _ in own if b < common]
    return prompt + text[common:], [*moved, *((max(b, common) + shift, e + shift) for b, e in own)]


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
