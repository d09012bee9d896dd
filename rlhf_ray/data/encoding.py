"""From text to token ids, and which of them are learned.

The rule: **prompt and answer are tokenized apart.** The generator is given the prompt's tokens and appends its own, so
a token that reaches over the boundary can never come out of it. Tokenizing "2+2=" and "4" together may give a token
"=4": training would then learn an answer after a prompt (without its "=") that no generation ever starts from. The
same pieces make the prompts of reinforcement learning, so both see the same tokens, by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.chat import Chat, Instruction, Message, Messages, Prompt
from rlhf_ray.data.columns import Text
from rlhf_ray.data.dialogues import ASSISTANT, dialogue_messages, is_dialogue
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.rendered import Around, around_messages
from rlhf_ray.data.templates import ChatTemplate, Piece, alpaca_prompt
from rlhf_ray.data.turn_end import TurnEnd, end_of_turn, turn_end_ids
from rlhf_ray.data.written import check_written
from rlhf_ray.errors import DataError, ModelError

Style = Literal["auto", "chat", "alpaca", "none"]
_ANCHOR = "\n"
_Written: TypeAlias = tuple[Chat, Sequence[Sequence[Piece]], Sequence[int]]


class Encoder:
    """Prompts, answers, conversations and texts as token ids of one tokenizer, under one template.

    `style`: `chat` puts everything that has a prompt into the chat template, `alpaca` into the instruction template,
    `none` takes texts as they are, `auto` decides by what the row is. `clock` is what a chat template takes for now
    (None: the present moment); a variable of its own, such as Llama's date_string, goes before it. DataErrors from here
    name no place: add it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        style: Style = "auto",
        system_prompt: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        learn: Literal["all", "last"] = "all",
        clock: datetime | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no EOS token, so no answer could end; set eos_token in its config")
        self._tokenizer, self._style = tokenizer, style
        self._system_prompt, self._learn = system_prompt, learn
        # A name that is given hides the one that Transformers' templates have, which reads the time anew each time.
        self._chat_args = {"strftime_now": (clock or datetime.now()).strftime, **(chat_template_args or {})}
        self._chat: ChatTemplate | None = None
        self._marks_beginnings = _marks_beginnings(tokenizer)
        self._unused: set[str] = set()

    def prompt(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """(text, token ids) that the generator gets. Raises DataError for a prompt without tokens."""
        chat, pieces = self._to_ask(prompt)
        return self._asked(chat, pieces, self._encode(pieces, templated=chat is not None).token_ids)

    def prompts(self, prompts: Sequence[Prompt]) -> list[tuple[str, tuple[int, ...], set[str]]]:
        """`prompt` and then `take_unused` of each, tokenized together, which is faster."""
        if not prompts:
            return []
        written = [self._to_ask(prompt) for prompt in prompts]
        texts = [pieces[0].text for _, pieces in written]
        plain = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        whole = plain if all(chat is not None for chat, _ in written) else self._tokenizer(texts)["input_ids"]
        made = []
        for (chat, pieces), first, with_specials in zip(written, plain, whole, strict=True):
            ids = first if chat is not None else self._beginning(with_specials, first)
            for piece in pieces[1:]:
                ids = ids + self._continuation(piece.text)
            made.append((*self._asked(chat, pieces, tuple(ids)), self.take_unused()))
        return made

    def _to_ask(self, prompt: Prompt) -> tuple[Chat | None, Sequence[Piece]]:
        """(the conversation that a template writes, the prompt's text in pieces)"""
        chat = self._as_chat(prompt)
        return chat, [Piece(self._plain(prompt))] if chat is None else self._template().prompt(chat)

    def _asked(self, chat: Chat | None, pieces: Sequence[Piece], ids: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        text = "".join(piece.text for piece in pieces)
        if not ids:
            raise DataError(f"the prompt {text!r} has no tokens; remove the row")
        if chat is not None:
            self._unused |= check_written(chat, text, write=self._template().text)
        return text, ids

    def answer(self, prompt: Prompt, answer: Text) -> TokenizedExample:
        """Prompt + answer + what ends it, of which the answer and its end are learned."""
        example, written = self._answered(prompt, answer)
        if written is not None:
            self._check_written(*written)
        return example

    def _answered(self, prompt: Prompt, answer: Text) -> tuple[TokenizedExample, _Written | None]:
        """(the sequence, what is to be checked of its text: None where no template has written it)."""
        chat = self._as_chat(prompt)
        if chat is None:
            if not isinstance(answer, str):
                raise DataError("the answer is messages, but the prompt is not; write both alike")
            pieces = [Piece(self._plain(prompt)), Piece.answer(answer)]
            end = self._end.answer if self._is_turn(prompt) else self._tokenizer.eos_token
            return self._encode(pieces, templated=False, end=None if self._is_ended(answer) else end), None
        answers, begun = self._without_ends(_answer_messages(prompt, answer)), None
        if chat.messages[-1]["role"] == "assistant":  # an unfinished turn, which the answer goes on with
            begun = chat.messages[-1]
            answers = (_continued(begun, answers[0]), *answers[1:])
            chat = chat.with_messages(chat.messages[:-1])
        whole = chat.with_messages((*chat.messages, *answers))
        sequences = self._template().conversation(whole, _to_learn(whole, len(chat.messages)), begun)
        if len(sequences) > 1:
            raise DataError("the answer has several turns, which the chat template writes otherwise once more follow")
        written = (whole, sequences, [len(whole.messages) - 1])
        return self._encode(sequences[0], templated=True), written

    def judged(self, prompt: Prompt, answer: Text, *, finished: bool = True) -> TokenizedExample:
        """What a reward model reads of an answer that a policy wrote; `finished`: its turn has ended.

        The very tokens that it reads in training; see `as_judged`. Raises DataError where the chat template refuses it.
        """
        return self.as_judged(prompt, self._answered(prompt, answer)[0], finished=finished)

    def as_judged(self, prompt: Prompt, example: TokenizedExample, *, finished: bool = True) -> TokenizedExample:
        """What a reward model reads of what `answer` gave for `prompt` (and `data.max_length` may have cut).

        Of a conversation, also one that somebody has rendered, everything up to what ends the answer's turn, and
        nothing behind it; where the turn has not ended, everything before that. Of a plain text everything without EOS,
        and with what the tokenizer itself puts behind a text (BERT's [SEP]): a plain text ends where it ends.
        """
        ids, learned = example.token_ids, example.learned
        ends = [place for place, token in enumerate(ids) if learned[place] and token in self._stops]
        if not ends:
            return example
        if self._as_chat(prompt) is not None or self._is_turn(prompt):
            end = ends[-1] + finished
            return TokenizedExample(ids[:end], learned[:end])
        if self._tokenizer.decode(ids[ends[-1] + 1 :]).strip():
            return example
        behind = self._behind_texts
        return TokenizedExample((*ids[: ends[-1]], *behind), (*learned[: ends[-1]], *(False for _ in behind)))

    def with_own_end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """A finished conversation, ended as the chat template ends it.

        A policy may stop at another special token (EOS, where the template writes <end_of_turn>); no reward model has
        learned from a text that ends so, and each would have a score of its own that says nothing of the answer.
        """
        ends = [self._tokenizer.convert_tokens_to_ids(end) for end in (self._end.answer, self._end.call) if end]
        added = self._tokenizer.added_tokens_decoder.get(ids[-1])
        if not self._end.answer or ids[-1] in ends or added is None or not added.special:
            return ids
        return (*ids[:-1], ends[0])

    @functools.cached_property
    def _behind_texts(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts behind every text."""
        whole, plain = self._tokenizer("a")["input_ids"], self._plain_ids("a")
        begins = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return tuple(whole[begins + len(plain) :])

    def chat_of(self, prompt: Prompt) -> Chat | None:
        """A prompt as a conversation with all that the settings give it, for whoever renders it with a template of its
        own; None where it is a plain text."""
        chat = self._as_chat(prompt)
        return chat and replace(chat, template_args={**self._chat_args, **(chat.template_args or {})})

    def completion(self, prompt: Prompt, answer: Text) -> tuple[int, ...]:
        """The answer's tokens alone, as a policy would write them after `prompt`: what ends its turn is the last."""
        example = self.answer(prompt, answer)
        ids = example.token_ids[len(self.prompt(prompt)[1]) :]
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in self._stops), len(ids))]

    def conversation(self, chat: Chat) -> list[TokenizedExample]:
        """Sequences in which the assistant's turns (all, or the last) are learned; see ChatTemplate.conversation."""
        chat = self._with_system_prompt(chat)
        turns = _to_learn(chat, 1)
        turns = turns if self._learn == "all" else turns[-1:]
        sequences = self._template().conversation(chat, turns)
        self._check_written(chat, sequences, turns)
        return [self._encode(pieces, templated=True) for pieces in sequences]

    def take_unused(self) -> set[str]:
        """Names of what the template has left out without harm since the last call; see data/written.py."""
        taken, self._unused = self._unused, set()
        return taken

    def text(self, text: str) -> TokenizedExample:
        """A whole text and EOS, all learned."""
        end = None if self._is_ended(text) else self._tokenizer.eos_token
        return self._encode([Piece.answer(text)], templated=False, end=end)

    @functools.cached_property
    def _end(self) -> TurnEnd:
        """What ends a turn under the chat template; plain texts that somebody has rendered with it end so too."""
        return end_of_turn(self._tokenizer) if self._chat is None else self._chat.end

    @functools.cached_property
    def _around(self) -> Around:
        return around_messages(self._tokenizer)

    @functools.cached_property
    def _stops(self) -> frozenset[int]:
        return frozenset(turn_end_ids(self._tokenizer, self._end))

    def _is_turn(self, prompt: Prompt) -> bool:
        """Whether a plain prompt has been through the chat template: what ends a turn, or begins one, stands in it."""
        if not isinstance(prompt, str):
            return False
        return bool(self._end.answer) and self._end.answer in prompt or self._around.stands_in(prompt)

    def _is_rendered(self, text: str) -> bool:
        """Whether a text has its special tokens: those of a turn, or what begins a text."""
        bos = self._tokenizer.bos_token
        return self._is_turn(text) or bool(bos and text.startswith(bos))

    def _is_ended(self, text: str) -> bool:
        """Whether what ends a turn stands at the end of a text already."""
        return text.rstrip().endswith(self._ends)

    @property
    def _ends(self) -> tuple[str, ...]:
        return tuple(end for end in (self._tokenizer.eos_token, self._end.answer, self._end.call) if end)

    def _check_written(self, chat: Chat, sequences: Sequence[Sequence[Piece]], turns: Sequence[int]) -> None:
        """Whether the sequences hold what the chat says up to the last of `turns`; each ends with one, if several."""
        since = 0
        for pieces, last in zip(sequences, turns[-len(sequences) :], strict=True):
            part = chat.with_messages(chat.messages[: last + 1])
            self._unused |= check_written(part, "".join(piece.text for piece in pieces), since, self._template().text)
            since = last + 1
        if any(message["role"] != "system" for message in chat.messages[since:]):
            self._unused.add("messages[] after the last answer that is learned")

    def _template(self) -> ChatTemplate:
        if self._style in ("alpaca", "none"):
            raise DataError(f"these are chat messages, and data.template={self._style} has no place for them; set chat")
        if self._chat is None:
            self._chat = ChatTemplate(self._tokenizer, self._chat_args)
        return self._chat

    def _as_chat(self, prompt: Prompt) -> Chat | None:
        """The prompt as a conversation, where the chat template is to write it; else None."""
        if not isinstance(prompt, Chat):
            if self._style != "chat" or (isinstance(prompt, str) and self._is_rendered(prompt)):
                return None
            text = _joined(prompt) if isinstance(prompt, Instruction) else prompt
            prompt = Chat(dialogue_messages(text) if is_dialogue(text) else ({"role": "user", "content": text},))
        if not prompt.messages:
            raise DataError("the prompt has no question; remove the row")
        return self._with_system_prompt(prompt)

    def _without_ends(self, messages: Messages) -> Messages:
        """Answers without what ends a turn: some data carry it in the text, and the template writes its own."""

        def bare(message: Message) -> Message:
            content = message.get("content")
            if message["role"] != "assistant" or not isinstance(content, str):
                return message
            while self._is_ended(content):
                content = content.rstrip().removesuffix(next(e for e in self._ends if content.rstrip().endswith(e)))
            return {**message, "content": content}

        return tuple(map(bare, messages))

    def _with_system_prompt(self, chat: Chat) -> Chat:
        chat = chat.with_messages(self._without_ends(chat.messages))
        if self._system_prompt is None or chat.messages[0]["role"] == "system":
            return chat
        return chat.with_messages(({"role": "system", "content": self._system_prompt}, *chat.messages))

    def _plain(self, prompt: Prompt) -> str:
        if isinstance(prompt, Instruction):
            return _joined(prompt) if self._style == "none" else alpaca_prompt(prompt.instruction, prompt.input)
        assert isinstance(prompt, str)
        return alpaca_prompt(prompt) if self._style == "alpaca" else prompt

    def _encode(self, pieces: Sequence[Piece], *, templated: bool, end: str | None = None) -> TokenizedExample:
        """The pieces' tokens, one piece after another; the token `end` follows and is learned."""
        ids: list[int] = []
        learned: list[bool] = []
        for number, piece in enumerate(pieces):
            if number == 0:
                # A chat template has written its special tokens already: a second BOS would be wrong.
                added = self._plain_ids(piece.text)
                if not templated:
                    added = self._beginning(self._tokenizer(piece.text)["input_ids"], added)
            else:
                added = self._continuation(piece.text)
            ids += added
            learned += self._learned(piece, added)
        if end is not None:
            ids.append(self._tokenizer.convert_tokens_to_ids(end))
            learned.append(True)
        return TokenizedExample(tuple(ids), tuple(learned))

    def _learned(self, piece: Piece, ids: Sequence[int]) -> list[bool]:
        if not piece.learned or piece.learned == ((0, len(piece.text)),):
            return [bool(piece.learned)] * len(ids)
        if not self._tokenizer.is_fast:
            raise ModelError(
                "the chat template marks parts of a piece with {% generation %}, and this tokenizer cannot say which "
                "characters a token is; use its fast version, or a template whose marks begin after the prompt"
            )
        encoded = self._tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
        # From the end: where a first blank was anchored away, the ids are fewer than the offsets.
        offsets = encoded["offset_mapping"][-len(ids) :]
        return [any(begin < e and b < end for b, e in piece.learned) for begin, end in offsets]

    def _plain_ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _beginning(self, ids: list[int], plain: list[int]) -> list[int]:
        """A text's tokens with the special ones that the tokenizer puts before it, but not those that it puts after it.

        `ids`: with all of them; `plain`: with none. A text that somebody has rendered begins with them already, and
        gets no second ones.
        """
        eos = self._tokenizer.eos_token_id
        if ids and ids[-1] == eos and plain[-1:] != [eos]:
            ids = ids[:-1]
        before = len(ids) - len(plain)
        return plain if before > 0 and plain[:before] == ids[:before] else ids

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text that goes on where another ended."""
        if self._marks_beginnings:
            anchor, anchored = self._plain_ids(_ANCHOR), self._plain_ids(_ANCHOR + text)
            if anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self._plain_ids(text)


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text for the tokenizer's own call, which writes BOS itself: rendered texts begin with one already."""
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos) or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(bos)


def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether "a" alone is other tokens than "a" after something, as in Llama 2, which puts a blank before any text.

    There an answer tokenized by itself would begin with a blank that nobody wrote.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    anchor, both = ids(_ANCHOR), ids(f"{_ANCHOR}a")
    return both[: len(anchor)] == anchor and both[len(anchor) :] != ids("a")


def _to_learn(chat: Chat, start: int) -> list[int]:
    """Positions of the assistant's messages from `start` on, without those whose `weight` is 0. Raises DataError."""
    answers = [i for i, message in enumerate(chat.messages) if i >= start and message["role"] == "assistant"]
    if not answers:
        raise DataError("the conversation holds no answer of the assistant, so there is nothing to learn")
    weights = [chat.messages[i].get("weight") for i in answers]
    if wrong := [weight for weight in weights if weight not in (None, 0, 1)]:
        raise DataError(f"a message has weight {wrong[0]!r}; it is 1 (learn this answer) or 0 (do not)")
    turns = [i for i, weight in zip(answers, weights, strict=True) if weight != 0]
    if not turns:
        raise DataError("every answer of the assistant has weight 0, so there is nothing to learn; remove the row")
    return turns


def _answer_messages(prompt: Prompt, answer: Text) -> Messages:
    if isinstance(answer, tuple):
        return answer
    if isinstance(prompt, str) and is_dialogue(prompt):
        return dialogue_messages(ASSISTANT + answer)
    return ({"role": "assistant", "content": answer},)


def _continued(begun: Message, answer: Message) -> Message:
    """An unfinished message of the assistant's and what follows it, as one. Raises DataError where they are no text."""
    parts = [message.get("content") for message in (begun, answer)]
    if not all(isinstance(part, str) for part in parts):
        raise DataError("the prompt ends with an unfinished answer that is no text, so none can go on with it")
    return {**answer, "content": "".join(parts)}


def _joined(prompt: Instruction) -> str:
    return f"{prompt.instruction}\n\n{prompt.input}" if prompt.input else prompt.instruction
