"""The prompts of a run, of one source or of several: which are learned from, and which are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.schema import DataConfig, PromptsConfig
from rlhf_ray.data.prompts import Example, PromptSet, load_prompts, prompt_options
from rlhf_ray.data.stream import apportion
from rlhf_ray.data.tasks import is_task
from rlhf_ray.data.token_rows import joined_rows, mapped
from rlhf_ray.errors import ConfigError

# The column that names a row's source to reward functions and to normalize_rewards=source, as in verl's data.
SOURCE_COLUMN = "data_source"


def load_split(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    clock: datetime | None,
    asked: int | None = None,
    reference_field: str | None = None,
) -> tuple[PromptSet, PromptSet]:
    """(prompts to learn from, held-out prompts), source after source.

    Held out are those of `eval_path`, of a source's own `eval_path`, of a task's test problems; else the last
    `eval_size` prompts, of several sources their shares. `asked` bounds how many of them are kept, as evenly over the
    sources as they have some. `reference_field`: see `load_prompts`.
    """
    whole = [
        named(
            load_prompts(
                part.data.path, tokenizer, split=part.data.split, limit=part.data.limit,
                reference_field=reference_field, cache=data.cache_dir, **prompt_options(part.data, clock),
            ),
            part.name, part.weight,
        )
        for part in data.parts
    ]  # fmt: skip
    cuts = held_out_counts(data, [len(prompts) for prompts in whole])
    train = joined([prompts.slice(0, len(prompts) - cut) for prompts, cut in zip(whole, cuts, strict=True)])
    if data.eval_path is not None:
        return train, _test_prompts(data.eval_path, data, tokenizer, clock, asked)
    held_out = []
    for part, prompts, cut in zip(data.parts, whole, cuts, strict=True):
        own = _own_test(part.data)
        if own is None:
            held_out.append(prompts.slice(len(prompts) - cut, len(prompts)))
        else:
            held_out.append(named(_test_prompts(own, part.data, tokenizer, clock, asked), part.name, part.weight))
    counts = [len(prompts) for prompts in held_out]
    kept = counts if asked is None else apportion(asked, [1] * len(counts), most=counts)
    return train, joined([prompts.slice(0, count) for prompts, count in zip(held_out, kept, strict=True)])


def held_out_counts(data: DataConfig, rows: Sequence[int]) -> list[int]:
    """How many of its last prompts each source holds out, which has so many `rows`; none of them all.

    Raises ConfigError where they are too few.
    """
    if data.eval_path is not None:
        return [0] * len(rows)
    shared = [count if _own_test(part.data) is None else 0 for part, count in zip(data.parts, rows, strict=True)]
    most = [max(0, count - 1) for count in shared]
    if any(shared) and sum(most) < data.eval_size:
        raise ConfigError(
            f"data.eval_size={data.eval_size} would hold out all {sum(shared)} prompts of {data.paths}; "
            "lower it, or set data.eval_path"
        )
    return apportion(data.eval_size, shared, most) if any(shared) else [0] * len(rows)


def named(prompts: PromptSet, name: str, weight: float | None = None) -> PromptSet:
    """The prompts as those of the source `name`, with a column that says so; '' is the only one, which says nothing."""
    if not name:
        return prompts


    def of_source(example: Example) -> Example:
        return replace(example, source=name, columns={SOURCE_COLUMN: name, **example.columns})

    examples = mapped(prompts.examples, of_source)
    return replace(prompts, examples=examples, label=f"{name} ({prompts.label})", name=name, weight=weight)


def joined(sets: Sequence[PromptSet]) -> PromptSet:
    """The prompts of several sources, one source after the other."""
    if len(sets) == 1:
        return sets[0]
    return PromptSet(
        joined_rows([prompts.examples for prompts in sets]),
        joined_rows([prompts.token_ids for prompts in sets]),
        dict(sum((Counter(prompts.dropped) for prompts in sets), Counter())),
        joined_rows([prompts.answers for prompts in sets]),
        of=tuple(sets),
    )


def _own_test(data: DataConfig) -> str | None:
    """Where the held-out prompts of one source come from, if not out of its own rows."""
    return data.eval_path or (data.path if is_task(data.path) else None)


def _test_prompts(
    path: str, data: PromptsConfig, tokenizer: PreTrainedTokenizerBase, clock: datetime | None, asked: int | None
) -> PromptSet:
    found = load_prompts(path, tokenizer, split="test", limit=asked, **prompt_options(data, clock))
    return replace(found, label=f"{path}, held out")
