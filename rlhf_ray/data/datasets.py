"""From a data source to token ids for supervised training, preferences and classification."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.cleaning import Cleaner, CleaningReport
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.examples import LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.data.fingerprint import Fingerprint
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.trees import tree_form
from rlhf_ray.data.types import prompt_of
from rlhf_ray.data.uses import Comparisons, Demonstrations, Labelled, Use
from rlhf_ray.errors import DataError

Item = TypeVar("Item")
OnReport = Callable[[CleaningReport], None]


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
    return _load(data, Demonstrations(make_encoder(data, tokenizer, clock)), seed, on_report)


def load_pairs(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None,
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:  # fmt: skip
    """(train, held out) pairs; K ranked answers make C(K, 2) of them, whose margin is the difference of their scores.

    Both sequences begin with the same prompt tokens, of which none is learned. See `load_supervised` for the rest.
    """
    return _load(data, Comparisons(make_encoder(data, tokenizer, clock)), seed, on_report)


def load_labelled(
    data: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, on_report: OnReport = ignore,
    clock: datetime | None = None,
) -> tuple[list[LabelledText], list[LabelledText]]:  # fmt: skip
    """(train, held out) texts with their class, as a classifier reads them: the tokenizer's special tokens, no EOS.

    A prompt and its completion are judged as one text, as reward models judge them. A text longer than
    `data.max_length` is refused, dropped or truncated as `data.overlong` says. See `load_supervised` for the rest.
    """
    return _load(data, Labelled(data, tokenizer), seed, on_report)


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
    data: DatasetConfig, use: Use[Item], seed: int, on_report: OnReport
) -> tuple[list[Item], list[Item]]:
    """(train, held out): the rows of `eval_path`, or `eval_size` rows of `path`."""
    items = _read(data, data.path, data.split, data.limit, use, on_report)
    if data.eval_path is not None:
        limit = data.eval_size or None
        held_out = _read(data, data.eval_path, data.eval_split, limit, use, on_report)
        return [item for _, item in items], [item for _, item in held_out]
    return _split(items, data, seed)


def _read(
    data: DatasetConfig,
    source: str,
    split: str,
    limit: int | None,
    use: Use[Item],
    on_report: OnReport,
) -> list[tuple[str, Item]]:
    """(prompt, item) of everything usable in one source."""
    cleaner = Cleaner(data.cleaning, max_length=data.max_length, overlong=data.overlong)
    form, read = tree_form(data.type, use.trees_as), Fingerprint()
    found = read_rows(source, split=split, trees_as=form, dropped=cleaner.dropped)
    rows = read.watching(itertools.islice(found, limit))
    items = []
    for row, record in cleaner.records(rows, None if data.type == "auto" else data.type, data.columns):
        prompt = repr(prompt_of(record))
        items += [(prompt, item) for item in use(record, cleaner, row.where)]
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
