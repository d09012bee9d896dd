"""Prompts for reinforcement learning: reading, checking, tokenizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.config.schema import PromptsConfig
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.cleaning import explain_unused
from rlhf_ray.data.columns import USUAL, Columns
from rlhf_ray.data.encoding import Encoder, Style
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.rows import Row, placed, read_rows
from rlhf_ray.data.stream import Part
from rlhf_ray.data.tasks import is_task, load_task
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.types import detect, detect_asked, parse, prompt_column, prompt_of, prompts_in, texts_of
from rlhf_ray.data.values import EmptyRowError, says_something, shown
from rlhf_ray.data.words import segment_spans
from rlhf_ray.errors import DataError

_TAKEN_NAMES = ("prompts", "completions", "completion_ids")  # reward functions get these from the rollout


@dataclass(frozen=True)
class Example:
    """One prompt as the generator gets it, with the other columns of its row (they reach the reward functions).

    `where` is `file:line`. `asked` is the prompt before any template: what people and judges read; `chat` the same as a
    conversation, with what the settings give it, where a chat template has written the prompt. `source`: its
    name, where there are several.
    """

    prompt: str
    columns: dict[str, Any]
    where: str = ""
    asked: Prompt = ""
    chat: Chat | None = None
    source: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Usable prompts, their token ids, and how many rows were left out and why.

    `read` is the fingerprint of the rows that they come from, as they stand in the data; `label` says where that is.
    Prompts of several sources stand one source after the other; `of` holds them by source, with names and weights.
    """

    examples: tuple[Example, ...]
    token_ids: tuple[tuple[int, ...], ...]
    dropped: dict[str, int]
    answers: tuple[tuple[tuple[int, ...], ...], ...] = ()  # token ids of each prompt's reference answers, if asked for
    read: str = ""
    unused: Mapping[str, int] = field(default_factory=dict)  # rows by column or key of messages that nothing reads
    label: str = ""
    name: str = ""
    weight: float | None = None
    of: tuple[PromptSet, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def left_out(self) -> str:
        """What was dropped and what nothing reads, for people; empty where everything is there."""
        parts = [_explain(self.dropped)] if self.dropped else []
        return "; ".join([*parts, *([explain_unused(self.unused)] if self.unused else [])])

    def slice(self, start: int, end: int) -> PromptSet:
        """Rows start..end-1; what was dropped counts for the whole."""
        part = slice(start, end)
        return replace(
            self, examples=self.examples[part], token_ids=self.token_ids[part], answers=self.answers[part], of=()
        )

    @property
    def sets(self) -> tuple[PromptSet, ...]:
        """By source."""
        return self.of or (self,)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a stream goes over."""
        return tuple(Part(prompts.name, len(prompts), prompts.weight) for prompts in self.sets)


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
    template: Style = "auto",
    chat_template: str | None = None,
    system_prompt: str | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
    clock: datetime | None = None,
) -> PromptSet:
    """Prompts of a file, a Hugging Face dataset or a built-in task (`task:arithmetic`).

    Any dataset type is a source of prompts (data/types.py); an answer that ends a conversation is left out. `field`
    names the column instead. `prompt_words` cuts each text to that many words; texts with nothing left to write are
    dropped and counted. A prompt of more than `max_prompt_tokens` is refused, or dropped and counted. `limit` keeps
    the first rows only. `reference_field` names the column with good answers. `template` and what belongs to
    it are those of data/encoding.py; the tokenizer gets the chat template.
    Raises DataError, which names file and line.
    """
    set_chat_template(tokenizer, chat_template)
    encoder = Encoder(
        tokenizer, style=template, system_prompt=system_prompt, chat_template_args=chat_template_args, clock=clock
    )
    rows = PromptRows(encoder, field, prompt_words, max_prompt_tokens, overlong)
    read, dropped = Fingerprint(), rows.dropped
    examples, ids, answers = [], [], []
    for prompt, columns, where in _asked(source, rows, split, read):
        if (made := rows.example(prompt, columns, where)) is None:
            continue
        example, tokens = made
        examples.append(example)
        ids.append(tokens)
        if reference_field is not None:
            with placed(where):
                answers.append(_reference_answers(example.asked, columns.get(reference_field), encoder))
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{source}: no usable prompt ({_explain(dropped)}); check the file and data.* limits")
    counts = {why: count for why, count in dropped.items() if count}
    return PromptSet(tuple(examples), tuple(ids), counts, tuple(answers), read.value, rows.unused, source)


class PromptRows:
    """Rows as a policy is asked them. The first one decides the type, unless `field` names the prompt's column.

    Counts what it leaves out in `dropped`, by reason, and what has no use in `unused`, by name. Without an encoder
    prompts are read and cut, and not tokenized.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        field: str | None = None,
        prompt_words: int | None = None,
        max_prompt_tokens: int | None = None,
        overlong: str = "error",
        names: ColumnsConfig = USUAL,
        kind: DataType | None = None,
    ):
        self._encoder, self._words, self._limit, self._overlong = encoder, prompt_words, max_prompt_tokens, overlong
        self._names = names if field is None else ColumnsConfig(prompt=field)
        self.kind = kind if field is None else "prompt"
        self.dropped: Counter[str] = Counter(short=0, long=0, empty=0)
        self.unused: Counter[str] = Counter()

    def asked(self, row: Row) -> list[tuple[Prompt, dict[str, Any]]]:
        """(prompt, the row's other columns) of each prompt of a row. Raises DataError, which names file and line."""
        self.kind = self.kind or detect_asked(row, self._names)
        copied = prompt_column(row, self.kind, self._names)
        columns = {name: value for name, value in row.fields.items() if name not in (copied, *_TAKEN_NAMES)}
        try:
            prompts = prompts_in(row, self.kind, self._names, self.unused)
        except EmptyRowError:
            if self.kind != "preference":
                raise
            self.dropped["empty"] += 1  # one of its two answers: nobody's mistake, and no reason to stop
            return []
        self.unused.update(name for name in _TAKEN_NAMES if name != copied and says_something(row.fields.get(name)))
        return [(prompt, columns) for prompt in prompts]

    def example(
        self, prompt: Prompt, columns: dict[str, Any], where: str
    ) -> tuple[Example, tuple[int, ...]] | None:
        """A prompt with its token ids; None where it is left out. Raises DataError, which names file and line."""
        if self._words is not None:
            if not isinstance(prompt, str):
                raise DataError(f"{where}: data.prompt_words cuts plain texts, and this is none; remove prompt_words")
            columns = {**columns, "text": prompt}
            prompt = first_words(prompt, self._words)
            if prompt is None:
                self.dropped["short"] += 1
                return None
        if self._encoder is None:
            return Example("", columns, where, prompt), ()
        with placed(where):
            text, tokens = self._encoder.prompt(prompt)
        self.unused.update(self._encoder.take_unused())
        if not self._fits(tokens, where):
            self.dropped["long"] += 1
            return None
        return Example(text, columns, where, prompt, self._encoder.chat_of(prompt)), tokens

    def _fits(self, tokens: Sequence[int], where: str) -> bool:
        if self._limit is None or len(tokens) <= self._limit:
            return True
        if self._overlong == "drop":
            return False
        raise DataError(
            f"{where}: the prompt has {len(tokens)} tokens, the limit is {self._limit}; "
            "raise data.max_prompt_tokens, shorten the prompt, or set data.overlong_prompts=drop"
        )


def prompt_options(data: PromptsConfig, clock: datetime | None) -> dict[str, Any]:
    """What `load_prompts` needs to know of the settings, for training and held-out prompts alike."""
    return {
        "field": data.field,
        "prompt_words": data.prompt_words,
        "max_prompt_tokens": data.max_prompt_tokens,
        "overlong": data.overlong_prompts,
        "template": data.template,
        "chat_template": data.chat_template,
        "chat_template_args": data.chat_template_args,
        "system_prompt": data.system_prompt,
        "clock": clock,
    }


def prompt_encoder(data: PromptsConfig, tokenizer: PreTrainedTokenizerBase, clock: datetime | None) -> Encoder:
    """How `load_prompts` reads prompts under these settings; the tokenizer gets the chat template."""
    set_chat_template(tokenizer, data.chat_template)
    return Encoder(
        tokenizer, style=data.template, system_prompt=data.system_prompt, chat_template_args=data.chat_template_args,
        clock=clock,
    )  # fmt: skip


def load_texts(source: str, *, field: str | None = None, split: str = "train") -> list[str]:
    """All the text of each row, or one column's: the corpus for a tokenizer and for a supervised warm start."""
    return [text for _, text in located_texts(source, field=field, split=split)]


def vocabulary_texts(source: str, *, field: str | None = None, split: str = "train") -> list[str]:
    """As `load_texts`, for a tokenizer; of a row whose answer nobody can read the prompt, all that a policy gets."""
    return [text for _, text in located_texts(source, field=field, split=split, prompts_will_do=True)]


def located_texts(
    source: str,
    *,
    field: str | None = None,
    split: str = "train",
    prompts_will_do: bool = False,
    unused: Counter[str] | None = None,
) -> list[tuple[str, str]]:
    """(`file:line`, text), as `load_texts`; `unused` counts rows by column or key of messages that is no part of it."""
    unused = Counter() if unused is None else unused
    kind: DataType | None = None
    texts = []
    for row in read_rows(source, split=split):
        if field is not None:
            columns = Columns(row, ColumnsConfig(text=field))
            texts.append((row.where, columns.text("text")))
            unused.update(columns.unused())
            continue
        kind = kind or detect(row)
        try:
            found: Sequence[Any] = parse(row, kind, unused=unused)
            unused.update(_beside_texts(found))
        except DataError:
            if not prompts_will_do:
                raise
            found = [prompt for prompt, _ in PromptRows(None, kind=kind).asked(row)]
        texts += [(row.where, "\n".join(texts_of(record))) for record in found]
    return texts


def _beside_texts(records: Sequence[Any]) -> set[str]:
    """What a template would read and plain texts have no place for."""
    chats = [chat for record in records if isinstance(chat := prompt_of(record), Chat)]
    names = {"tools": "tools", "template_args": "chat_template_kwargs"}
    return {name for key, name in names.items() if any(getattr(chat, key) for chat in chats)}


def first_words(text: str, count: int) -> str | None:
    """The first `count` words (characters, where a script has no blanks), or None where no word comes after them."""
    spans = list(segment_spans(text))
    return " ".join(text[: spans[count - 1][1]].split()) if len(spans) > count else None


def _asked(
    source: str, rows: PromptRows, split: str, read: Fingerprint
) -> Iterator[tuple[Prompt, dict[str, Any], str]]:
    """(prompt, the row's other columns, where) of every prompt of a source."""
    if is_task(source):
        for pair in load_task(source).split(split):
            where = f"{source}:{pair.prompt}"
            read.add({**pair.columns, "prompt": pair.prompt}, where)
            yield pair.prompt, dict(pair.columns), where
        return
    for row in read.watching(read_rows(source, split=split, trees_as="prompt", dropped=rows.dropped)):
        for prompt, columns in rows.asked(row):
            yield prompt, columns, row.where


def _reference_answers(prompt: Prompt, value: Any, encoder: Encoder) -> tuple[tuple[int, ...], ...]:
    """Token ids, EOS at the end, of a text or a list of texts; one that repeats the prompt counts from behind it."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            f"the reference answer is {shown(value)}, not a text or a list of texts; mend the row, or set "
            "rollout.reference_field to a column of the data"
        )
    begins = prompt if isinstance(prompt, str) else ""
    return tuple(encoder.completion(prompt, text.removeprefix(begins)) for text in texts)


def _explain(dropped: dict[str, int]) -> str:
    reasons = {"short": "too short for prompt_words", "long": "longer than max_prompt_tokens", "empty": "empty"}
    parts = [f"{count} {reasons.get(why, why)}" for why, count in dropped.items() if count]
    return ", ".join(parts) or "it has no rows"
