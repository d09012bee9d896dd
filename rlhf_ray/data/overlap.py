"""Prompts that are trained on and asked in a test too: what such a test measures is memory."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import suppress
from dataclasses import dataclass

from rlhf_ray.config.data import ColumnsConfig, DataType
from rlhf_ray.data.asking import as_messages
from rlhf_ray.data.chat import Prompt
from rlhf_ray.data.near_duplicates import NearDuplicates
from rlhf_ray.data.parts import written
from rlhf_ray.data.privacy import PersonalData
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.trees import TreeForm
from rlhf_ray.data.types import detect, parse, prompt_of
from rlhf_ray.data.words import fold
from rlhf_ray.errors import DataError


@dataclass(frozen=True)
class Place:
    """`where` (file:line) of `source` asks the same; `exactly`, or nearly."""

    source: str
    where: str
    exactly: bool

    def __str__(self) -> str:
        return f"{'also' if self.exactly else 'nearly'} in {self.source}"


class HeldOutPrompts:
    """The prompts that a run is judged on. Case, width, white space, and whether a prompt is a text or messages make no
    difference.

    With `near` (Jaccard's index of word triples, see near_duplicates.py) prompts that are that much alike count too.
    """

    def __init__(self, near: float | None = None):
        self._places: dict[bytes, tuple[str, str]] = {}
        self._near: NearDuplicates[tuple[str, str]] | None = None if near is None else NearDuplicates(near)

    def add(self, source: str, where: str, prompt: Prompt) -> None:
        text = written(as_messages(prompt))
        self._places.setdefault(_key(text), (source, where))
        if self._near is not None:
            self._near.add((source, where), [text])

    def find(self, prompt: Prompt) -> Place | None:
        text = written(as_messages(prompt))
        exact = self._places.get(_key(text))
        if exact is not None:
            return Place(*exact, exactly=True)
        near = None if self._near is None else self._near.find([text])
        return None if near is None else Place(*near, exactly=False)

    def add_rows(
        self,
        source: str,
        *,
        split: str,
        limit: int | None,
        kind: DataType | None,
        names: ColumnsConfig,
        trees_as: TreeForm = "messages",
        personal: PersonalData | None = None,
    ) -> None:
        """The prompts of a source. Rows that cannot be read are passed over: who uses them names them.

        `personal` is what is done with personal data in the rows that are compared with these.
        """
        rows = read_rows(source, split=split, on_bad=lambda error: None, trees_as=trees_as)
        for row in itertools.islice(rows, limit):
            with suppress(DataError):
                row = row if personal is None else personal.seen(row)
                kind = kind or detect(row, names)
                for record in parse(row, kind, names):
                    self.add(source, row.where, prompt_of(record))


def _key(text: str) -> bytes:
    # A digest, not the text: held-out files may be large.
    return hashlib.blake2b(" ".join(fold(text).split()).encode(), digest_size=16).digest()
