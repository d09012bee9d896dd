"""What each command makes of a record: sequences to learn, pairs to compare, texts with a class.

The loaders (data/datasets.py) and `validate-data` call the same code, so that they agree on every row. Without an
encoder or tokenizer a use checks what can be said before there are tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.chat import Chat
from rlhf_ray.data.cleaning import TIED, UNWANTED, Cleaner
from rlhf_ray.data.encoding import Encoder, without_bos
from rlhf_ray.data.examples import LabelledAnswer, LabelledText, TokenizedExample, TokenizedPair
from rlhf_ray.data.rows import placed
from rlhf_ray.data.trees import TreeForm
from rlhf_ray.data.types import AnswerRow, ConversationRow, PreferenceRow, RankedRow, Record, TextRow
from rlhf_ray.errors import DataError

Item = TypeVar("Item", covariant=True)


class Use(Protocol[Item]):
    """From one record to what training reads; `where` is for complaints. Raises DataError, which names the place."""

    trees_as: TreeForm

    def __call__(self, record: Record, cleaner: Cleaner, where: str) -> Iterator[Item]: ...


class Demonstrations:
    """For `sft`: answers, assistant turns or whole texts. Of a preference the chosen answer, of a ranking the best."""

    trees_as: TreeForm = "messages"

    def __init__(self, encoder: Encoder | None):
        self._encoder = encoder

    def __call__(self, record: Record, cleaner: Cleaner, where: str) -> Iterator[TokenizedExample]:
        with placed(where):
            shown = _demonstration(record)
        if isinstance(shown, AnswerRow) and shown.label == 0:
            cleaner.dropped[UNWANTED] += 1
            return
        if self._encoder is None:
            return
        with placed(where):
            examples = _learned(shown, self._encoder)
        cleaner.unused.update(self._encoder.take_unused())
        for example in examples:
            if cleaner.is_answered(example) and (kept := cleaner.fitting(example, where=where)):
                yield kept[0]


class Comparisons:
    """For `rm` and `dpo`: K ranked answers make C(K, 2) pairs, whose margin is the difference of their scores.

    `judged`: as a reward model reads them (`Encoder.as_judged`), not as a policy writes them.
    """

    trees_as: TreeForm = "ranked"

    def __init__(self, encoder: Encoder | None, *, judged: bool = False):
        self._encoder, self._judged = encoder, judged

    def __call__(self, record: Record, cleaner: Cleaner, where: str) -> Iterator[TokenizedPair]:
        for pair in _comparisons(record, cleaner, where):
            if self._encoder is None:
                continue
            with placed(where):
                chosen, rejected = (
                    self._encoder.answer(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)
                )
            if cleaner.is_answered(chosen, rejected) and (kept := cleaner.fitting(chosen, rejected, where=where)):
                if self._judged:
                    kept = tuple(self._encoder.as_judged(pair.prompt, example) for example in kept)
                if not cleaner.is_same(*kept):
                    yield TokenizedPair(*kept, margin=pair.margin)
        if self._encoder is not None:
            cleaner.unused.update(self._encoder.take_unused())


class LabelledAnswers:
    """For `dpo` with `dpo.kind=kto`: single answers that are good or bad. A pair gives a good one and a bad one."""

    trees_as: TreeForm = "ranked"

    def __init__(self, encoder: Encoder | None):
        self._encoder, self._pairs = encoder, Comparisons(encoder)

    def __call__(self, record: Record, cleaner: Cleaner, where: str) -> Iterator[LabelledAnswer]:
        if isinstance(record, PreferenceRow):
            for pair in self._pairs(record, cleaner, where):
                yield LabelledAnswer(pair.chosen.token_ids, pair.chosen.learned, good=True)
                yield LabelledAnswer(pair.rejected.token_ids, pair.rejected.learned, good=False)
            return
        if isinstance(record, RankedRow):
            raise DataError(
                f"{where}: a ranking says which answer is better and not which is good; give each answer a row with a "
                "label, or use dpo.kind=sigmoid"
            )
        if not isinstance(record, AnswerRow) or record.label is None:
            raise DataError(
                f"{where}: no answer that is good or bad; dpo.kind=kto needs the fields prompt, completion and label "
                "(true or false), or chosen and rejected; name them with data.columns"
            )
        if self._encoder is None:
            return
        with placed(where):
            example = self._encoder.answer(record.prompt, record.completion)
        cleaner.unused.update(self._encoder.take_unused())
        if cleaner.is_answered(example) and (kept := cleaner.fitting(example, where=where)):
            yield LabelledAnswer(kept[0].token_ids, kept[0].learned, good=record.label == 1)


class Labelled:
    """For `classifier`: texts with their class, as a classifier reads them: the tokenizer's special tokens, no EOS.

    A conversation is read as reward models read it; `encoder` knows how, and a tokenizer without EOS has none.
    """

    trees_as: TreeForm = "messages"

    def __init__(self, data: DatasetConfig, tokenizer: PreTrainedTokenizerBase | None, encoder: Encoder | None = None):
        self._data, self._tokenizer, self._encoder = data, tokenizer, encoder

    def __call__(self, record: Record, cleaner: Cleaner, where: str) -> Iterator[LabelledText]:
        if isinstance(record, AnswerRow) and isinstance(record.prompt, Chat) and record.label is not None:
            yield from self._conversation(record, cleaner, where)
            return
        text, label = _labelled_text(record, where)
        if self._tokenizer is None:
            return
        text = without_bos(text, self._tokenizer)
        ids, longest = self._tokenizer(text)["input_ids"], self._data.max_length
        if self._data.overlong == "truncate" and len(ids) > longest:
            # By the tokenizer itself: it keeps the special token at the end, where many classifiers look.
            ids = self._tokenizer(text, truncation=True, max_length=longest)["input_ids"]
            cleaner.cut += 1
        if cleaner.fitting(TokenizedExample(tuple(ids), (True,) * len(ids)), where=where) is not None:
            yield LabelledText(tuple(ids), label)

    def _conversation(self, record: AnswerRow, cleaner: Cleaner, where: str) -> Iterator[LabelledText]:
        if self._tokenizer is None:
            return
        with placed(where):
            if self._encoder is None:
                raise DataError("these are chat messages, and the tokenizer has no EOS token that could end a turn")
            example = self._encoder.as_judged(record.prompt, self._encoder.answer(record.prompt, record.completion))
        cleaner.unused.update(self._encoder.take_unused())
        if (kept := cleaner.fitting(example, where=where)) is not None:
            yield LabelledText(kept[0].token_ids, record.label)


def _demonstration(record: Record) -> TextRow | ConversationRow | AnswerRow:
    """What is to be learned of a record. Raises DataError, without a place, where nothing is."""
    if isinstance(record, ConversationRow) and not _holds_answer(record.chat):
        roles = ", ".join(dict.fromkeys(message["role"] for message in record.chat.messages))
        raise DataError(
            "the conversation holds no answer of the assistant, so there is nothing to learn (its roles: "
            f"{roles}); give the answers the role assistant"
        )
    if isinstance(record, (TextRow, ConversationRow, AnswerRow)):
        return record
    if isinstance(record, PreferenceRow):
        return AnswerRow(record.prompt, record.chosen)
    if isinstance(record, RankedRow):
        return AnswerRow(record.prompt, record.completions[0])
    raise DataError(
        "a prompt without an answer (type prompt), so there is nothing to learn; add a field 'completion', or name "
        "the one that has it with data.columns.completion"
    )


def _holds_answer(chat: Chat) -> bool:
    return any(message["role"] == "assistant" for message in chat.messages[1:])


def _learned(shown: TextRow | ConversationRow | AnswerRow, encoder: Encoder) -> list[TokenizedExample]:
    if isinstance(shown, TextRow):
        return [encoder.text(shown.text)]
    if isinstance(shown, ConversationRow):
        return encoder.conversation(shown.chat)
    return [encoder.answer(shown.prompt, shown.completion)]


def _comparisons(record: Record, cleaner: Cleaner, where: str) -> Iterator[PreferenceRow]:
    if isinstance(record, PreferenceRow):
        yield record
        return
    if not isinstance(record, RankedRow):
        raise DataError(
            f"{where}: no pair of answers; preferences need the fields chosen and rejected (and prompt), or prompt and "
            "a list of completions; name them with data.columns (single answers with a label: dpo with dpo.kind=kto)"
        )
    for better, worse in itertools.combinations(range(len(record.completions)), 2):
        margin = 0.0 if record.scores is None else record.scores[better] - record.scores[worse]
        if record.scores is not None and margin == 0:
            cleaner.dropped[TIED] += 1
            continue
        yield PreferenceRow(record.prompt, record.completions[better], record.completions[worse], margin)


def _labelled_text(record: Record, where: str) -> tuple[str, int]:
    label = getattr(record, "label", None)
    if isinstance(record, TextRow) and label is not None:
        return record.text, label
    texts = (record.prompt, record.completion) if isinstance(record, AnswerRow) and label is not None else ()
    if texts and all(isinstance(text, str) for text in texts):
        return "".join(texts), label
    raise DataError(f"{where}: a classifier needs a text and its label; name them with data.columns")
