"""From a data source to token ids for supervised training, preferences and classification."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.cleaning import TIED, UNWANTED, Cleaner, CleaningReport
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.examples import LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.rows import placed, read_rows
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.trees import TreeForm, tree_form
from rlhf_ray.data.types import (
    AnswerRow,
    ConversationRow,
    PreferenceRow,
    RankedRow,
    Record,
    TextRow,
    prompt_of,
)
from rlhf_ray.errors import DataError

Item = TypeVar("Item")
OnReport = Callable[[CleaningReport], None]
# From one record to what training reads; `where` is for complaints.
Encode = Callable[[Record, Cleaner, str], Iterator[Item]]


def ignore(report: CleaningReport) -> None:
    """For callers that do not show what was left out."""


def load_supervised(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None,
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:  # fmt: skip
    """(train, held out) sequences: answers, assistant turns or whole texts are learned, EOS included.

    Of a preference the chosen answer is learned, of a ranking the best, of unpaired answers the good ones. `on_report`
    gets one report a source. The tokenizer gets `data.chat_template` if that is set; `clock` is what it takes for now.
    Raises DataError, which names file and line.
    """
    encoder = make_encoder(data, tokenizer, clock)

    def encode(record: Record, cleaner: Cleaner, where: str) -> Iterator[TokenizedExample]:
        with placed(where):
            examples = _demonstrations(record, encoder, cleaner)
        cleaner.unused.update(encoder.take_unused())
        for example in examples:
            if cleaner.is_answered(example) and (kept := cleaner.fitting(example, where=where)):
                yield kept[0]

    return _load(data, encode, seed, on_report)


def load_pairs(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None,
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:  # fmt: skip
    """(train, held out) pairs; K ranked answers make C(K, 2) of them, whose margin is the difference of their scores.

    Both sequences begin with the same prompt tokens, of which none is learned. See `load_supervised` for the rest.
    """
    encoder = make_encoder(data, tokenizer, clock)

    def encode(record: Record, cleaner: Cleaner, where: str) -> Iterator[TokenizedPair]:
        for pair in _comparisons(record, cleaner, where):
            with placed(where):
                chosen, rejected = (encoder.answer(pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
            if cleaner.is_answered(chosen, rejected) and (kept := cleaner.fitting(chosen, rejected, where=where)):
                yield TokenizedPair(*kept, margin=pair.margin)
        cleaner.unused.update(encoder.take_unused())

    return _load(data, encode, seed, on_report, trees_as="ranked")


def load_labelled(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None,
) -> tuple[list[LabelledText], list[LabelledText]]:  # fmt: skip
    """(train, held out) texts with their class, as a classifier reads them: the tokenizer's special tokens, no EOS.

    A prompt and its completion are judged as one text, as reward models judge them. A text longer than
    `data.max_length` is refused, dropped or truncated as `data.overlong` says. See `load_supervised` for the rest.
    """

    def encode(record: Record, cleaner: Cleaner, where: str) -> Iterator[LabelledText]:
        text, label = _labelled_text(record, where)
        ids = tokenizer(text)["input_ids"]
        if data.overlong == "truncate" and len(ids) > data.max_length:
            # By the tokenizer itself: it keeps the special token at the end, where many classifiers look.
            ids = tokenizer(text, truncation=True, max_length=data.max_length)["input_ids"]
            cleaner.cut += 1
        if cleaner.fitting(TokenizedExample(tuple(ids), (True,) * len(ids)), where=where) is not None:
            yield LabelledText(tuple(ids), label)

    return _load(data, encode, seed, on_report)


def make_encoder(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, clock: datetime | None = None
) -> Encoder:
    """What `data` says about templates; the tokenizer gets its chat template."""
    set_chat_template(tokenizer, data.chat_template)
    return Encoder(
        tokenizer,
        style=data.template,
        system_prompt=data.system_prompt,
        chat_template_args=data.chat_template_args,
        learn=data.learn,
        clock=clock,
    )


def _labelled_text(record: Record, where: str) -> tuple[str, int]:
    label = getattr(record, "label", None)
    if isinstance(record, TextRow) and label is not None:
        return record.text, label
    texts = (record.prompt, record.completion) if isinstance(record, AnswerRow) and label is not None else ()
    if texts and all(isinstance(text, str) for text in texts):
        return "".join(texts), label
    raise DataError(f"{where}: a classifier needs a text and its label; name them with data.columns")


def _demonstrations(record: Record, encoder: Encoder, cleaner: Cleaner) -> Sequence[TokenizedExample]:
    if isinstance(record, TextRow):
        return [encoder.text(record.text)]
    if isinstance(record, ConversationRow):
        return encoder.conversation(record.chat)
    if isinstance(record, AnswerRow):
        if record.label == 0:
            cleaner.dropped[UNWANTED] += 1
            return []
        return [encoder.answer(record.prompt, record.completion)]
    if isinstance(record, PreferenceRow):
        return [encoder.answer(record.prompt, record.chosen)]
    if isinstance(record, RankedRow):
        return [encoder.answer(record.prompt, record.completions[0])]
    raise DataError(
        "a prompt without an answer (type prompt), so there is nothing to learn; add a field 'completion', or name "
        "the one that has it with data.columns.completion"
    )


def _comparisons(record: Record, cleaner: Cleaner, where: str) -> Iterator[PreferenceRow]:
    if isinstance(record, PreferenceRow):
        yield record
        return
    if not isinstance(record, RankedRow):
        raise DataError(
            f"{where}: no pair of answers; preferences need the fields chosen and rejected (and prompt), or prompt and "
            "a list of completions; name them with data.columns"
        )
    for better, worse in itertools.combinations(range(len(record.completions)), 2):
        margin = 0.0 if record.scores is None else record.scores[better] - record.scores[worse]
        if record.scores is not None and margin == 0:
            cleaner.dropped[TIED] += 1
            continue
        yield PreferenceRow(record.prompt, record.completions[better], record.completions[worse], margin)


def _load(
    data: DatasetConfig, encode: Encode[Item], seed: int, on_report: OnReport, trees_as: TreeForm = "messages"
) -> tuple[list[Item], list[Item]]:
    """(train, held out): the rows of `eval_path`, or `eval_size` rows of `path`."""
    items = _read(data, data.path, data.split, data.limit, encode, on_report, trees_as)
    if data.eval_path is not None:
        limit = data.eval_size or None
        held_out = _read(data, data.eval_path, data.eval_split, limit, encode, on_report, trees_as)
        return [item for _, item in items], [item for _, item in held_out]
    return _split(items, data, seed)


def _read(
    data: DatasetConfig,
    source: str,
    split: str,
    limit: int | None,
    encode: Encode[Item],
    on_report: OnReport,
    trees_as: TreeForm,
) -> list[tuple[str, Item]]:
    """(prompt, item) of everything usable in one source."""
    cleaner = Cleaner(data.cleaning, max_length=data.max_length, overlong=data.overlong)
    form, read = tree_form(data.type, trees_as), Fingerprint()
    found = read_rows(source, split=split, trees_as=form, dropped=cleaner.dropped)
    rows = read.watching(itertools.islice(found, limit))
    items = []
    for row, record in cleaner.records(rows, None if data.type == "auto" else data.type, data.columns):
        prompt = repr(prompt_of(record))
        items += [(prompt, item) for item in encode(record, cleaner, row.where)]
    report = cleaner.report(source, len(items), read.value)
    if not items:
        raise DataError(f"nothing usable in {report}; check the file and data.* limits")
    on_report(report)
    return items


def _split(items: Sequence[tuple[str, Item]], data: DatasetConfig, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, held out), each in the order of the file; no prompt is in both.

    Prompts are drawn in the order of a keyed hash, so the draw is a pure function of seed and prompt.
    """
    places: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(items):
        places.setdefault(prompt, []).append(place)
    held_out: set[int] = set()
    for prompt in sorted(places, key=lambda prompt: hashlib.blake2b(f"{seed}/{prompt}".encode()).digest()):
        if len(held_out) + len(places[prompt]) <= data.eval_size:
            held_out.update(places[prompt])
    if len(held_out) == len(items):
        raise DataError(
            f"{data.path}: data.eval_size={data.eval_size} would hold out all {len(items)} examples; lower it, or set "
            "data.eval_path"
        )
    train = [item for place, (_, item) in enumerate(items) if place not in held_out]
    return train, [item for place, (_, item) in enumerate(items) if place in held_out]
