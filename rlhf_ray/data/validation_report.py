"""What `rlhf-ray validate-data` found, for people and as JSON."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.cleaning import explain_absent, explain_unused
from rlhf_ray.data.examples import TokenizedExample
from rlhf_ray.data.quality import QualityReport

_SHOWN = 5  # complaints of one kind; --json has all
_BRACKETS = ("\u27e6", "\u27e7")
_GREEN = ("\x1b[32m", "\x1b[0m")


@dataclass(frozen=True)
class RowNote:
    """What is to be said of one row."""

    where: str
    why: str


@dataclass(frozen=True)
class ShownPart:
    """Text of neighbouring tokens that are all learned, or all not."""

    text: str
    learned: bool


@dataclass(frozen=True)
class ShownSequence:
    """One sequence that a row makes; `name` tells the answers of a pair apart."""

    name: str
    parts: tuple[ShownPart, ...]

    @classmethod
    def of(cls, name: str, example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> ShownSequence:
        parts, end, before = [], 0, ""
        for learned, group in itertools.groupby(example.learned):
            start, end = end, end + len(list(group))
            text = _decoded(tokenizer, example.token_ids[:end])
            # Of the whole beginning: by themselves, the tokens of some families lose a blank.
            own = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, example.token_ids[start:end])
            parts.append(ShownPart(own, learned))
            before = text
        return cls(name, tuple(parts))

    def text(self, marks: tuple[str, str]) -> str:
        begin, end = marks
        return "".join(f"{begin}{part.text}{end}" if part.learned else part.text for part in self.parts)


@dataclass(frozen=True)
class ShownRow:
    """A row as the model reads it."""

    where: str
    sequences: tuple[ShownSequence, ...]


@dataclass(frozen=True)
class ValidationReport:
    """`types` counts the good rows. `left_out` counts, and `left_out_rows` names, those of them that `command` drops by
    reason; `kept` are the examples that it makes of the rest. `tokens` are of whole sequences.
    """

    source: str
    command: str
    rows: int
    types: dict[str, int]
    bad: tuple[RowNote, ...]
    left_out: dict[str, int]
    left_out_rows: tuple[RowNote, ...]
    kept: int
    unused: dict[str, int]
    absent: dict[str, str]  # by role, columns that the settings name and no row has
    tokens: dict[str, float] | None = None
    shown: ShownRow | None = None
    quality: QualityReport | None = None

    @property
    def is_good(self) -> bool:
        return not self.bad and self.kept > 0

    def __str__(self) -> str:
        return self.text()

    def text(self, *, colour: bool = False) -> str:
        """Lines for people; what is learned stands in brackets, or in colour on a terminal."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.types.items()) or "none good"
        lines = [
            *_capped(self.bad),
            f"{self.source}: {self.rows} rows: {kinds}; {len(self.bad)} bad (as {self.command} reads them)",
        ]
        if self.left_out:
            left_out = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
            lines += [f"{self.command} leaves out: {left_out}", *(f"  {line}" for line in _capped(self.left_out_rows))]
        if not self.bad and self.types and not self.kept:
            lines.append(f"{self.command} would have no row to learn from")
        if self.unused:
            lines.append(explain_unused(self.unused))
        if self.absent:
            lines.append(explain_absent(self.absent))
        if self.tokens:
            lines.append("tokens a sequence: " + ", ".join(f"{name} {size:g}" for name, size in self.tokens.items()))
        if self.quality:
            lines += self.quality.lines()
        return "\n".join([*lines, *self._shown(_GREEN if colour else _BRACKETS)])

    def _shown(self, marks: tuple[str, str]) -> Iterator[str]:
        if self.shown is None:
            return
        begin, end = marks
        yield f"\n{self.shown.where} as the model reads it; {begin}what is learned{end} is marked:"
        for sequence in self.shown.sequences:
            if sequence.name:
                yield f"--- {sequence.name}"
            yield sequence.text(marks)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)  # in ASCII: half characters of broken rows stand in complaints


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _capped(notes: Sequence[RowNote]) -> list[str]:
    """A line a note, of which no more than a few say the same; then how many more do."""
    seen: Counter[str] = Counter()
    lines: list[str] = []
    first: dict[str, RowNote] = {}
    for note in notes:
        reason = _reason(note.why)
        first.setdefault(reason, note)
        seen[reason] += 1
        if seen[reason] <= _SHOWN:
            lines.append(f"{note.where}: {note.why}")
    more = {reason: count - _SHOWN for reason, count in seen.items() if count > _SHOWN}
    return lines + [
        f"... and {count} more rows: same reason as {first[reason].where}" for reason, count in more.items()
    ]


def _reason(why: str) -> str:
    """A complaint without what differs from row to row: quoted values and numbers."""
    return re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+", "#", why)
