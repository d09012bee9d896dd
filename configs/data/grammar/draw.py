"""Sentences from a grammar: `{name}` stands for one of the name's alternatives, drawn by a seeded generator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SLOT = re.compile(r"\{(\w+)\}")
_MOST_TRIES = 100


def expand(rng: random.Random, rules: Mapping[str, Sequence[str]], text: str) -> str:
    """`text` with every slot filled. A text does not say the same alternative of a name twice, while it has others."""
    said: dict[str, list[str]] = {}

    def filled(match: re.Match[str]) -> str:
        name = match[1]
        rest = [choice for choice in rules[name] if choice not in said.get(name, ())] or list(rules[name])
        choice = rng.choice(rest)
        said.setdefault(name, []).append(choice)
        return _SLOT.sub(filled, choice)

    return with_articles(_SLOT.sub(filled, text))


def with_articles(text: str) -> str:
    """`a` before a vowel is `an`; sentences begin with a capital."""
    text = re.sub(r"\b([Aa]) (?=[aeiou](?!ne\b|ni|se[fd]))", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def distinct(draw: Callable[[], Any], count: int, key: Callable[[Any], Any], seen: set[Any]) -> list[Any]:
    """`count` things with a new key each; what is in `seen` does not come again, in no later call either."""
    rows: list[Any] = []
    for _ in range(count * _MOST_TRIES):
        if len(rows) == count:
            return rows
        row = draw()
        if key(row) not in seen:
            seen.add(key(row))
            rows.append(row)
    raise ValueError(f"the grammar gives {len(rows)} different rows and not {count}")
