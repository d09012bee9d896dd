"""A row as a policy is asked it: its prompt, cut, rendered and tokenized, with the row's other columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.columns import USUAL
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.rows import Row, placed
from rlhf_ray.data.types import detect_asked, prompt_column, prompts_in
from rlhf_ray.data.values import EmptyRowError, says_something
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
        cut = self._cut(prompt, columns, where)
        if cut is None or self._encoder is None:
            return self._example(cut, where)
        with placed(where):
            text, tokens = self._encoder.prompt(cut[0])
        return self._example(cut, where, (text, tokens, self._encoder.take_unused()))

    def examples(
        self, asked: Sequence[tuple[Prompt, dict[str, Any], str]]
    ) -> list[tuple[Example, tuple[int, ...]] | None]:
        """`example` of each, tokenized together."""
        try:
            cuts = [self._cut(*one) for one in asked]
            encoded = iter(self._encoder.prompts([cut[0] for cut in cuts if cut is not None]))
        except DataError:  # of which row, the rows one by one say
            self._encoder.take_unused()
            return [self.example(*one) for one in asked]
        return [
            self._example(cut, where, None if cut is None else next(encoded))
            for cut, (_, _, where) in zip(cuts, asked, strict=True)
        ]

    def _cut(self, prompt: Prompt, columns: dict[str, Any], where: str) -> tuple[Prompt, dict[str, Any]] | None:
        """Prompt and columns; None where nothing would be left to write."""
        if self._words is None:
            return prompt, columns
        if not isinstance(prompt, str):
            raise DataError(f"{where}: data.prompt_words cuts plain texts, and this is none; remove prompt_words")
        words = first_words(prompt, self._words)
        return None if words is None else (words, {**columns, "text": prompt})

    def _example(
        self,
        cut: tuple[Prompt, dict[str, Any]] | None,
        where: str,
        encoded: tuple[str, tuple[int, ...], set[str]] | None = None,
    ) -> tuple[Example, tuple[int, ...]] | None:
        if cut is None:
            self.dropped["short"] += 1
            return None
        prompt, columns = cut
        if encoded is None:
            return Example("", columns, where, prompt), ()
        text, tokens, unused = encoded
        self.unused.update(unused)
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


def first_words(text: str, count: int) -> str | None:
    """The first `count` words (characters, where a script has no blanks), or None where no word comes after them."""
    spans = list(segment_spans(text))
    return " ".join(text[: spans[count - 1][1]].split()) if len(spans) > count else None
