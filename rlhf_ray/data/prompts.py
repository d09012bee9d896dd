"""Prompts for reinforcement learning: reading, checking, tokenizing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from datetime import datetime
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.config.schema import PromptsConfig
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.cleaning import explain_unused
from rlhf_ray.data.columns import Columns
from rlhf_ray.data.encoding import Encoder, Style
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.prompt_cache import Kept, NotPlainError, Place, Record, Writer, opened, place_of
from rlhf_ray.data.prompt_rows import Example, PromptRows
from rlhf_ray.data.rows import placed, read_rows
from rlhf_ray.data.stream import Part
from rlhf_ray.data.tasks import is_task, load_task
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.token_rows import Made
from rlhf_ray.data.types import detect, parse, prompt_of, texts_of
from rlhf_ray.data.values import shown
from rlhf_ray.errors import DataError

BATCH = 512  # prompts that are tokenized together
KEPT_FROM = 10_000  # with a limit below, so little of a large file is read that it is not kept


@dataclass(frozen=True)
class PromptSet:
    """Usable prompts, their token ids, and how many rows were left out and why.

    `read` is the fingerprint of the rows that they come from, as they stand in the data; `label` says where that is.
    Prompts of several sources stand one source after the other; `of` holds them by source, with names and weights.
    Those of a large file lie on disk, and each is made when it is asked for (data/prompt_cache.py).
    """

    examples: Sequence[Example]
    token_ids: Sequence[tuple[int, ...]]
    dropped: dict[str, int]
    answers: Sequence[tuple[tuple[int, ...], ...]] = ()  # token ids of each prompt's reference answers, if asked for
    read: str = ""
    unused: Mapping[str, int] = attribute(default_factory=dict)  # rows by column or key of messages that nothing reads
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
    cache: str | None = "none",
) -> PromptSet:
    """Prompts of a file, a Hugging Face dataset or a built-in task (`task:arithmetic`).

    Any dataset type is a source of prompts (data/types.py); an answer that ends a conversation is left out. `field`
    names the column instead. `prompt_words` cuts each text to that many words; texts with nothing left to write are
    dropped and counted. A prompt of more than `max_prompt_tokens` is refused, or dropped and counted. `limit` keeps
    the first rows only. `reference_field` names the column with good answers. `template` and what belongs to
    it are those of data/encoding.py; the tokenizer gets the chat template. `cache`: folder in which the prompts of a
    large file are kept (None: the usual one; `none`: nowhere).
    Raises DataError, which names file and line.
    """
    set_chat_template(tokenizer, chat_template)
    encoder = Encoder(
        tokenizer, style=template, system_prompt=system_prompt, chat_template_args=chat_template_args, clock=clock
    )

    def reading() -> Reading:
        rows = PromptRows(encoder, field, prompt_words, max_prompt_tokens, overlong)
        return Reading(source, split, rows, encoder, limit, reference_field)

    settings = {
        "split": split, "limit": limit, "field": field, "prompt_words": prompt_words, "overlong": overlong,
        "max_prompt_tokens": max_prompt_tokens, "reference_field": reference_field, "template": template,
        "system_prompt": system_prompt, "args": dict(chat_template_args or {}), "clock": str(clock),
    }  # fmt: skip
    large = limit is None or limit >= KEPT_FROM
    place = place_of(source, tokenizer, settings, cache) if large else None
    kept = place and (opened(place) or _keep(place, reading()))
    return reading().all() if kept is None else _of_cache(kept, source, encoder, reference_field is not None)


def _keep(place: Place, reading: Reading) -> Kept | None:
    """Read a source into a cache; None where it cannot be kept: JSON has no word for a row, or the disk takes none."""
    writer = None
    try:
        writer = Writer(place)
        for made in reading.batches():
            writer.add([ids for _, ids, _ in made], [
                Record(example.prompt, example.columns, example.where, example.asked, answers)
                for example, _, answers in made
            ])  # fmt: skip
        reading.require_some(writer.rows)
        writer.finish(reading.about())
        return opened(place)
    except (NotPlainError, OSError):
        return None
    finally:
        if writer is not None:
            writer.close()


def _of_cache(kept: Kept, source: str, encoder: Encoder, answered: bool) -> PromptSet:
    def example(record: Record) -> Example:
        return Example(record.prompt, record.columns, record.where, record.asked, encoder.chat_of(record.asked))

    records, about = kept.records, kept.about
    examples = Made(lambda index: example(records[index]), range(len(records)))
    answers = Made(lambda index: records[index].answers, range(len(records) if answered else 0))
    return PromptSet(
        examples, kept.tokens, about["dropped"], answers if answered else (), about["read"], about["unused"], source
    )


Asked: TypeAlias = tuple[Example, tuple[int, ...], tuple[tuple[int, ...], ...]]  # tokens, and those of its answers


@dataclass
class Reading:
    """A source on its way to prompts: once."""

    source: str
    split: str
    rows: PromptRows
    encoder: Encoder
    limit: int | None
    reference_field: str | None

    def __post_init__(self) -> None:
        self.read, self.count = Fingerprint(), 0

    def all(self) -> PromptSet:
        made = [one for batch in self.batches() for one in batch]
        self.require_some(len(made))
        examples, ids, answers = zip(*made, strict=True)
        about = self.about()
        return PromptSet(
            examples, ids, about["dropped"], answers if self.reference_field is not None else (), about["read"],
            self.rows.unused, self.source,
        )  # fmt: skip

    def batches(self) -> Iterator[list[Asked]]:
        """Prompts with their tokens and reference answers, as they come. A row that cannot be read ends it as late as
        if each were read by itself."""
        asked = _asked(self.source, self.rows, self.split, self.read)
        while True:
            wanted = BATCH if self.limit is None else min(BATCH, self.limit - self.count)
            found, problem = [], None
            try:
                for one in itertools.islice(asked, wanted):  # no row is read that the limit leaves out
                    found.append(one)
            except DataError as error:
                problem = error
            made = self._made(found)
            self.count += len(made)
            if made:
                yield made
            if problem is not None:
                raise problem
            if len(found) < wanted or self.count == self.limit:
                return

    def _made(self, asked: Sequence[tuple[Prompt, dict[str, Any], str]]) -> list[Asked]:
        found = []
        for made in filter(None, self.rows.examples(asked)):
            answers: tuple[tuple[int, ...], ...] = ()
            if self.reference_field is not None:
                with placed(made[0].where):
                    value = made[0].columns.get(self.reference_field)
                    answers = _reference_answers(made[0].asked, value, self.encoder)
            found.append((*made, answers))
        return found

    def require_some(self, count: int) -> None:
        if not count:
            why = _explain(self.rows.dropped)
            raise DataError(f"{self.source}: no usable prompt ({why}); check the file and data.* limits")

    def about(self) -> dict[str, Any]:
        """Of all rows, once they are read."""
        dropped = {why: count for why, count in self.rows.dropped.items() if count}
        return {"dropped": dropped, "unused": dict(self.rows.unused), "read": self.read.value}


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
