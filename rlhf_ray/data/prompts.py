"""Prompts for reinforcement learning: reading, checking, tokenizing, and their endless shuffled stream."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.data.tasks import is_task, load_task
from rlhf_ray.errors import ConfigError, DataError

_DETECTED_FIELDS = ("prompt", "messages", "text")


@dataclass(frozen=True)
class Example:
    """One prompt as text, with the other columns of its row (they reach the reward functions).

    `templated` is True where a chat template wrote the text, special tokens included. `where` is `file:line`.
    """

    prompt: str
    columns: dict[str, Any]
    templated: bool = False
    where: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Usable prompts, their token ids, and how many rows were left out and why."""

    examples: tuple[Example, ...]
    token_ids: tuple[tuple[int, ...], ...]
    dropped: dict[str, int]
    answers: tuple[tuple[tuple[int, ...], ...], ...] = ()  # token ids of each prompt's reference answers, if asked for

    def __len__(self) -> int:
        return len(self.examples)

    def slice(self, start: int, end: int) -> PromptSet:
        """Rows start..end-1; what was dropped counts for the whole."""
        part = slice(start, end)
        return PromptSet(self.examples[part], self.token_ids[part], self.dropped, self.answers[part])


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str | None = None,
    prompt_words: int | None = None,
    max_prompt_tokens: int | None = None,
    overlong: Literal["error", "drop"] = "error",
    split: str = "train",
    limit: int | None = None,
    reference_field: str | None = None,
) -> PromptSet:
    """Prompts of a file, a Hugging Face dataset or a built-in task (`task:arithmetic`).

    `field` names the column; None takes the first of prompt, messages and text that the first row has.
    `prompt_words` cuts the prompt to that many words; texts with nothing left to write are dropped and counted.
    A prompt of more than `max_prompt_tokens` is refused, or dropped and counted. `limit` keeps the first rows
    only. `reference_field` names the column with good answers. Raises DataError, which names file and line.
    """
    dropped = {"short": 0, "long": 0}
    examples, ids = [], []
    for example in _examples(source, tokenizer, field, split):
        if prompt_words is not None:
            cut = first_words(example.prompt, prompt_words)
            if cut is None:
                dropped["short"] += 1
                continue
            example = Example(cut, {**example.columns, "text": example.prompt}, False, example.where)
        tokens = tuple(encode_prompt(example, tokenizer))
        if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
            if overlong == "error":
                raise DataError(
                    f"{example.where}: the prompt has {len(tokens)} tokens, the limit is {max_prompt_tokens}; "
                    "raise data.max_prompt_tokens, shorten the prompt, or set data.overlong_prompts=drop"
                )
            dropped["long"] += 1
            continue
        examples.append(example)
        ids.append(tokens)
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{source}: no usable prompt ({_explain(dropped)}); check the file and data.* limits")
    answers = () if reference_field is None else tuple(
        encode_answers(example, tokens, tokenizer, reference_field)
        for example, tokens in zip(examples, ids, strict=True)
    )  # fmt: skip
    return PromptSet(tuple(examples), tuple(ids), {why: count for why, count in dropped.items() if count}, answers)


def load_texts(source: str, *, field: str = "text", split: str = "train") -> list[str]:
    """The whole texts of one column: the corpus for a tokenizer and for a supervised warm start."""
    return [_text_of(row, field) for row in read_rows(source, split=split)]


def first_words(text: str, count: int) -> str | None:
    """The first `count` words, or None where the text has no word after them."""
    words = text.split()
    return " ".join(words[:count]) if len(words) > count else None


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one prompt. A chat template has written its special tokens already: a second BOS would be wrong."""
    ids = tokenizer(example.prompt, add_special_tokens=not example.templated)["input_ids"]
    if not ids:
        raise DataError(f"{example.where}: the prompt {example.prompt!r} has no tokens; remove the row")
    return ids


def encode_answers(
    example: Example, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, field: str
) -> tuple[tuple[int, ...], ...]:
    """Token ids, EOS at the end, of the answers in one column: a text, or a list of texts.

    A text that repeats the prompt counts from behind it. Raises DataError.
    """
    value = example.columns.get(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            f"{example.where}: column {field!r} holds {value!r}, not an answer or a list of answers; mend the row, or "
            "set rollout.reference_field to a column of the data"
        )
    return tuple(_encode_answer(text.removeprefix(example.prompt), example, tuple(prompt), tokenizer) for text in texts)


def _encode_answer(
    text: str, example: Example, prompt: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    # Encoded behind its prompt, as the policy would have written it, if the prompt's own tokens stay what they are.
    whole = tuple(tokenizer(example.prompt + text, add_special_tokens=not example.templated)["input_ids"])
    joins = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    ids = whole[len(prompt) :] if joins else tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == (eos,) else (*ids, eos)


def _examples(source: str, tokenizer: PreTrainedTokenizerBase, field: str | None, split: str) -> Iterable[Example]:
    if is_task(source):
        for pair in load_task(source).split(split):
            yield Example(pair.prompt, dict(pair.columns), where=f"{source}:{pair.prompt}")
        return
    for row in read_rows(source, split=split):
        field = field or _detect(row)
        yield _example(row, field, tokenizer)


def _detect(row: Row) -> str:
    for name in _DETECTED_FIELDS:
        if name in row.fields:
            return name
    raise DataError(
        f"{row.where}: none of the fields {', '.join(_DETECTED_FIELDS)}; the row has "
        f"{', '.join(map(repr, row.fields)) or 'none'}; set data.field to the one with the prompt"
    )


def _example(row: Row, field: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    value = row.fields.get(field)
    columns = {k: v for k, v in row.fields.items() if k != field}
    if isinstance(value, (list, tuple)):
        return Example(_render_chat(value, row, field, tokenizer), columns, True, row.where)
    return Example(_text_of(row, field), columns, False, row.where)


def _text_of(row: Row, field: str) -> str:
    if field not in row.fields:
        raise DataError(
            f"{row.where}: no field {field!r}; the row has {', '.join(map(repr, row.fields))}; "
            "set data.field to one of these, or mend the row"
        )
    value = row.fields[field]
    if not isinstance(value, str):
        raise DataError(
            f"{row.where}: field {field!r} is of type {type(value).__name__}, not text; give a string or chat messages"
        )
    if not value.strip():
        raise DataError(f"{row.where}: field {field!r} is empty; remove the row, or fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: field {field!r} holds half of a character (position {error.start}), which no tokenizer "
            "reads; remove it, or write the file again from its source"
        ) from error
    return value


def _render_chat(messages: Sequence[Any], row: Row, field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Chat messages to text that ends where the assistant's answer begins; an answer in the row is left out."""
    problem = _chat_problem(messages)
    if problem:
        raise DataError(
            f'{row.where}: field {field!r} {problem}; write a list like [{{"role": "user", "content": "Hello"}}]'
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: field {field!r} holds chat messages, but this tokenizer has no chat template; "
            "use an instruction-tuned model, set tokenizer.chat_template, or give plain text prompts"
        )
    turns = list(messages)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _chat_problem(messages: Sequence[Any]) -> str | None:
    if not messages:
        return "is an empty list of messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "holds a message without a role"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return "holds a message without content"
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return "holds an answer but no question"
    return None


def _explain(dropped: dict[str, int]) -> str:
    reasons = {"short": "too short for prompt_words", "long": "longer than max_prompt_tokens"}
    parts = [f"{count} {reasons[why]}" for why, count in dropped.items() if count]
    return ", ".join(parts) or "it has no rows"


class PromptStream:
    """An endless shuffled stream: position 0, 1, 2, ... -> (epoch, example index).

    A pure function of (seed, position): its only state is the position, which the checkpoint keeps as an integer.
    Every epoch visits every example once, in an order of its own.
    """

    def __init__(self, n_examples: int, seed: int):
        if n_examples < 1:
            raise ConfigError("data: a stream over 0 examples never yields a prompt; give it at least one")
        self.n_examples, self.seed = n_examples, seed

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"a stream has no position {position}: positions count from 0")
        epoch, place = divmod(position, self.n_examples)
        return epoch, _epoch_order(self.n_examples, self.seed, epoch)[place]

    def take(self, position: int, count: int) -> list[tuple[int, int]]:
        """The `count` entries from `position` on."""
        return [self[p] for p in range(position, position + count)]


@functools.lru_cache(maxsize=8)
def _epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Sorting by a keyed hash is a uniform shuffle that no library version can change under a resumed run.
    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(n_examples), key=rank))
