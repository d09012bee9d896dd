"""What a supervised run starts from: its tokenizer and its model, as they are or built on the spot, and its rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.given import Given
from rlhf_ray.config.supervised import ClassifierConfig, DPOConfig, RMConfig, SFTConfig, SupervisedConfig
from rlhf_ray.data.cleaning import CleaningReport, fingerprints_of
from rlhf_ray.data.datasets import load_labelled, load_labelled_answers, load_pairs, load_supervised
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.fingerprint import CHAT_TEMPLATE, fingerprint_of_template
from rlhf_ray.data.privacy import PersonalData
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.stream import by_turns
from rlhf_ray.data.templates import alpaca_prompt
from rlhf_ray.models.fits import limits_of, require_end, require_rows_fit
from rlhf_ray.models.folders import save_folder
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.scratch import build_scratch, build_scratch_classifier
from rlhf_ray.roles.supervised_factory import labels_of
from rlhf_ray.run.storage import written_whole
from rlhf_ray.start.tokenizer import open_tokenizer

Splits = dict[str, list[Any]]
# Of a held-out text without a prompt, so many tokens are given for a sample.
PROMPT_TOKENS = 8


def check_inputs(
    config: SupervisedConfig, start: Path | None, note: Callable[[CleaningReport], None]
) -> tuple[Any, Splits, int]:
    """(tokenizer, rows by split, how many of `train` are plain text): all that people get wrong, read before anything
    is made.

    `start`: the folder that an earlier part of the run has made its tokenizer in; it need not be there.
    Raises RlhfRayError: a package, a file, a row or a tokenizer that cannot be used.
    """
    require(needs_of(config))
    tokenizer = load_tokenizer(start) if start is not None and start.is_dir() else make_tokenizer(config)
    require_end(tokenizer, config.model.tokenizer.path or config.model.path, "text")
    splits, plain = load_splits(config, tokenizer, note)
    check_model_fits(config, tokenizer, splits)
    return tokenizer, splits, plain


def sources_of(reports: Sequence[CleaningReport], tokenizer: Any) -> dict[str, str]:
    """Fingerprints of all the rows that the run reads, by source, in the order of reading, and of the chat template."""
    return {CHAT_TEMPLATE: fingerprint_of_template(tokenizer.chat_template), **fingerprints_of(reports)}


def make_tokenizer(config: SupervisedConfig) -> PreTrainedTokenizerBase:
    """The model's own, another folder's, or one whose vocabulary is learned from the rows."""
    tokenizer = open_tokenizer(config.model, lambda: corpus(config.data), config.data.paths)
    learned = (config.model.tokenizer.path or config.model.path).startswith("scratch:")
    if learned and isinstance(config, ClassifierConfig):
        tokenizer.padding_side = "right"  # a classifier does not generate; an encoder reads its first token
    return tokenizer


def corpus(data: DatasetConfig) -> list[str]:
    """All texts of the training rows, whatever their columns, and of the instruction template if they need it."""
    texts: list[str] = []
    for part in data.parts:
        own = part.data
        personal = PersonalData(own.cleaning.privacy)  # what is masked must not become a word of the vocabulary
        for row in itertools.islice(read_rows(own.path, split=own.split, trees_as=None), own.limit):
            texts += _texts_in(personal.seen(row).fields)
            if "instruction" in row.fields and len(texts) < 100:
                texts += [alpaca_prompt(""), alpaca_prompt("", "")]
    return texts


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        # Half of a character stands in a column that nobody else reads: no tokenizer has a token for it.
        yield value.encode("utf-8", "ignore").decode("utf-8")
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def load_splits(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, note: Callable[[CleaningReport], None]
) -> tuple[Splits, int]:
    """(rows by split, how many rows of `train` are plain text): `train`, and `val` and `test` where there are any.

    Raises DataError, which names file and line.
    """
    load = load_supervised
    if isinstance(config, ClassifierConfig):
        load = load_labelled
    elif isinstance(config, DPOConfig) and config.dpo.kind == "kto":
        load = load_labelled_answers
    elif not isinstance(config, SFTConfig):
        load = functools.partial(load_pairs, judged=isinstance(config, RMConfig))
    options = {"seed": config.seed, "on_report": note, "clock": config.clock}
    train, held_out = load(config.data, tokenizer, tested_on=config.eval.test_path, **options)
    splits, plain = {"train": train}, 0
    if held_out:
        splits["val"] = held_out
    if config.eval.test_path is not None:
        test = config.data.model_copy(update={"path": config.eval.test_path, "eval_path": None, "eval_size": 0,
                                              "limit": None, "split": config.data.eval_split,
                                              "sources": []})  # fmt: skip
        splits["test"] = load(test, tokenizer, **options)[0]
    if isinstance(config, SFTConfig) and config.plain_text is not None:
        texts, _ = load_supervised(config.plain_text.data, tokenizer, **options)
        splits["train"], plain = [*train, *texts], len(texts)
    return splits, plain


def check_model_fits(config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Raises ConfigError, ModelError; DataError for a label without a name."""
    labels_of(config, splits)  # a label without a name is found before anything is made
    rows = [ids for items in splits.values() for item in items for ids in _ids(item)]
    limits = limits_of(config.model.path, trust_remote_code=config.model.trust_remote_code)
    require_rows_fit(limits, tokenizer, rows)


def _ids(item: Any) -> list[tuple[int, ...]]:
    return [item.chosen.token_ids, item.rejected.token_ids] if hasattr(item, "chosen") else [item.token_ids]


def starting_model(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits, folder: Path
) -> tuple[str, str]:
    """(model, tokenizer): paths to load. Writes `folder` only where something has to be made, and uses it again."""
    path = config.model.path
    own_tokenizer = config.model.tokenizer.path or path
    if isinstance(path, Given):
        _written(folder, lambda unfinished: save_folder(unfinished, path.value, tokenizer))
        return str(folder), str(folder)
    if not path.startswith("scratch:"):
        if config.data.chat_template is None and not isinstance(own_tokenizer, Given):
            return path, own_tokenizer
        _written(folder, lambda unfinished: save_folder(unfinished, tokenizer=tokenizer))
        return path, str(folder)

    def write(unfinished: Path) -> None:
        model = build_model(
            config, labels_of(config, splits), vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        save_folder(unfinished, model, tokenizer)

    _written(folder, write)
    return str(folder), str(folder)


def _written(folder: Path, write: Callable[[Path], Any]) -> None:
    if folder.is_dir():
        return
    with written_whole("the model to start from", folder) as unfinished:
        write(unfinished)


def build_model(config: SupervisedConfig, labels: Sequence[str], **options: int) -> PreTrainedModel:
    """A model from scratch, with a classifier's head where there are labels; `options`: its vocabulary."""
    kind = config.model.path.removeprefix("scratch:")
    options = {**config.model.scratch.model_dump(), "seed": config.seed, **options}
    return build_scratch_classifier(kind, labels=labels, **options) if labels else build_scratch(kind, **options)


def sample_prompts(splits: Splits, count: int) -> list[tuple[int, ...]]:
    """Token ids before the first learned one of held-out rows (or training rows, where none are held out)."""
    prompts: dict[tuple[int, ...], None] = {}
    examples = splits.get("val", splits["train"])
    for place in by_turns([example.source for example in examples]):
        example = examples[place]
        start = _prompt_length(example)
        prompts[example.token_ids[: start or PROMPT_TOKENS]] = None
        if len(prompts) >= count:
            break
    return list(prompts)[:count]


def _prompt_length(example: TokenizedExample) -> int:
    return next((place for place, learned in enumerate(example.learned) if learned), len(example.learned))
