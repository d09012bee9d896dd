"""From a data source to token ids for supervised training, preferences and classification."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.sources import Source
from rlhf_ray.data.cleaning import Cleaner, CleaningReport, Earlier
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.examples import LabelledAnswer, LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.overlap import HeldOutPrompts
from rlhf_ray.data.parts import prompt_key
from rlhf_ray.data.privacy import PersonalData
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.trees import TreeForm, tree_form
from rlhf_ray.data.types import prompt_of
from rlhf_ray.data.uses import Comparisons, Demonstrations, Labelled, LabelledAnswers, Use
from rlhf_ray.errors import DataError

Item = TypeVar("Item")
OnReport = Callable[[CleaningReport], None]
# The settings of one source -> what training makes of its rows.
Uses = Callable[[DatasetConfig], Use[Item]]


class Asked(NamedTuple):
    """The prompt of an item: a key that is the same in every form (text, messages, parts), and this form."""

    key: bytes
    form: str


def ignore(report: CleaningReport) -> None:
    """For callers that do not show what was left out."""


def load_supervised(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None, tested_on: str | None = None,
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:  # fmt: skip
    """(train, held out) sequences: answers, assistant turns or whole texts are learned, EOS included.

    Of a preference the chosen answer is learned, of a ranking the best, of unpaired answers the good ones. `on_report`
    gets one report a source. The tokenizer gets `data.chat_template` if that is set; `clock` is what it takes for now.
    `tested_on` is another source on which the run is judged: rows that ask its prompts are counted, or left out.
    Raises DataError, which names file and line.
    """
    def use_of(source: DatasetConfig) -> Use[TokenizedExample]:
        return Demonstrations(make_encoder(source, tokenizer, clock))

    return _load(data, use_of, seed, on_report, tested_on)


def load_pairs(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None, tested_on: str | None = None, judged: bool = False,
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:  # fmt: skip
    """(train, held out) pairs; K ranked answers make C(K, 2) of them, whose margin is the difference of their scores.

    Both sequences begin with the same prompt tokens, of which none is learned. `judged`: as a reward model reads them.
    See `load_supervised` for the rest.
    """
    def use_of(source: DatasetConfig) -> Use[TokenizedPair]:
        return Comparisons(make_encoder(source, tokenizer, clock), judged=judged)

    return _load(data, use_of, seed, on_report, tested_on)


def load_labelled_answers(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None, tested_on: str | None = None,
) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:  # fmt: skip
    """(train, held out) prompts with one answer each, which is good or bad; a pair makes two. See `load_supervised`."""
    def use_of(source: DatasetConfig) -> Use[LabelledAnswer]:
        return LabelledAnswers(make_encoder(source, tokenizer, clock))

    return _load(data, use_of, seed, on_report, tested_on)


def load_labelled(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None, tested_on: str | None = None,
) -> tuple[list[LabelledText], list[LabelledText]]:  # fmt: skip
    """(train, held out) texts with their class, as a classifier reads them: the tokenizer's special tokens, no EOS.

    A prompt and its completion are judged as one text, as reward models judge them. A text longer than
    `data.max_length` is refused, dropped or truncated as `data.overlong` says. See `load_supervised` for the rest.
    """
    def use_of(source: DatasetConfig) -> Use[LabelledText]:
        return labelled(source, tokenizer, clock)

    return _load(data, use_of, seed, on_report, tested_on)


def labelled(data: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None, clock: datetime | None = None) -> Labelled:
    """What a classifier makes of a record; one whose tokenizer has no EOS reads no conversations."""
    ends = tokenizer is not None and tokenizer.eos_token_id is not None
    return Labelled(data, tokenizer, make_encoder(data, tokenizer, clock) if ends else None)


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


def _load(
    data: DatasetConfig, use_of: Uses[Item], seed: int, on_report: OnReport, tested_on: str | None
) -> tuple[list[Item], list[Item]]:
    """(train, held out), source after source.

    Held out are the rows of `eval_path`, and of a source's own; and of the sources that have none `eval_size` in all.
    """
    items: list[tuple[Asked, Item]] = []
    may_be_held_out: list[bool] = []
    earlier = Earlier(data.cleaning.near_duplicates)
    for part in data.parts:
        own = part.data
        use, elsewhere = use_of(own), data.eval_path if own.eval_path is None else own.eval_path
        judged_on = _judged_on(own, elsewhere, data.eval_size, tested_on, use.trees_as)
        found = _read(own, own.path, own.split, own.limit, use, on_report, earlier, judged_on)
        items += [(prompt, _named(item, part.name)) for prompt, item in found]
        may_be_held_out += [own.eval_path is None and data.eval_path is None] * len(found)
    train, held_out = _split(items, may_be_held_out, data, seed)
    for part in data.parts if data.eval_path is None else [Source("", None, data, "data")]:
        own, limit = part.data, data.eval_size or None
        if own.eval_path is not None:
            found = _read(own, own.eval_path, own.eval_split, limit, use_of(own), on_report)
            held_out += [_named(item, part.name) for _, item in found]
        elif part.name and not any(item.source == part.name for item in train):
            raise DataError(
                f"{own.path}: data.eval_size={data.eval_size} holds out every row of this source; lower it, or set "
                f"{part.key}.eval_path"
            )
    return train, held_out


def _named(item: Item, source: str) -> Item:
    return replace(item, source=source) if source else item


def _judged_on(
    data: DatasetConfig, eval_path: str | None, eval_size: int, tested_on: str | None, trees_as: TreeForm
) -> HeldOutPrompts | None:
    """The prompts of the files that the training rows should not ask."""
    sources = [(eval_path, eval_size or None), (tested_on, None)]
    if all(source is None for source, _ in sources):
        return None
    prompts = HeldOutPrompts(data.cleaning.near_duplicates)
    kind = None if data.type == "auto" else data.type
    for source, limit in sources:
        if source is not None:
            prompts.add_rows(
                source,
                split=data.eval_split,
                limit=limit,
                kind=kind,
                names=data.columns,
                trees_as=tree_form(data.type, trees_as),
                personal=PersonalData(data.cleaning.privacy),
            )
    return prompts


def _read(
    data: DatasetConfig,
    source: str,
    split: str,
    limit: int | None,
    use: Use[Item],
    on_report: OnReport,
    earlier: Earlier | None = None,
    judged_on: HeldOutPrompts | None = None,
) -> list[tuple[Asked, Item]]:
    """(prompt, item) of everything usable in one source; `earlier`: what other sources have had."""
    cleaner = Cleaner(
        data.cleaning, max_length=data.max_length, overlong=data.overlong, earlier=earlier, held_out=judged_on
    )
    form, read = tree_form(data.type, use.trees_as), Fingerprint()
    found = read_rows(source, split=split, trees_as=form, dropped=cleaner.dropped)
    rows = read.watching(itertools.islice(found, limit))
    items = []
    for row, record in cleaner.records(rows, None if data.type == "auto" else data.type, data.columns):
        prompt = prompt_of(record)
        asked = Asked(prompt_key(prompt), repr(prompt))
        items += [(asked, item) for item in use(record, cleaner, row.where)]
    report = cleaner.report(source, len(items), read.value)
    if not items:
        raise DataError(f"nothing usable in {report}; check the file and data.* limits")
    on_report(report)
    return items


def _split(
    items: Sequence[tuple[Asked, Item]], may_be_held_out: Sequence[bool], data: DatasetConfig, seed: int
) -> tuple[list[Item], list[Item]]:
    """(train, held out), each in the order of the items; no prompt is in both, whatever sources and forms it stands in.

    Prompts are drawn in the order of a keyed hash, so the draw is a pure function of seed and prompt; of several forms
    the first in the alphabet counts.
    """
    places: dict[bytes, list[int]] = {}
    forms: dict[bytes, str] = {}
    for place, (asked, _) in enumerate(items):
        places.setdefault(asked.key, []).append(place)
        forms[asked.key] = min(asked.form, forms.get(asked.key, asked.form))
    places = {prompt: found for prompt, found in places.items() if all(may_be_held_out[place] for place in found)}
    held_out: set[int] = set()
    for prompt in sorted(places, key=lambda prompt: hashlib.blake2b(f"{seed}/{forms[prompt]}".encode()).digest()):
        if len(held_out) + len(places[prompt]) <= data.eval_size:
            held_out.update(places[prompt])
    if len(held_out) == len(items):
        raise DataError(
            f"{data.paths}: data.eval_size={data.eval_size} would hold out all {len(items)} examples; lower it, or set "
            "data.eval_path"
        )
    if data.eval_size and places and not held_out:
        fewest = min(map(len, places.values()))
        remedy = f"set data.eval_size={fewest} or more, or " if len(places) > 1 else ""
        raise DataError(
            f"{data.path}: data.eval_size={data.eval_size} holds out nothing: the examples of one prompt go together, "
            f"and each of the {len(places)} prompts has {fewest} or more; {remedy}set data.eval_path"
        )
    train = [item for place, (_, item) in enumerate(items) if place not in held_out]
    return train, [item for place, (_, item) in enumerate(items) if place in held_out]
