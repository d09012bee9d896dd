"""Names in a config: one of those that are known, or a user's own function by its place."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pydantic_core import PydanticCustomError


def is_own(name: str) -> bool:
    """Whether it is a user's own (`module:function`, `file.py:function`), not a registered name."""
    return ":" in name


def known_or_own(name: str, known: Collection[str]) -> str:
    """The name as it is. Raises PydanticCustomError, with the nearest known name, if it is neither."""
    if name in known or is_own(name):
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the built-in ones are {', '.join(known)}."
    said = f"{name!r} is unknown: {hint} Your own: module:function or file.py:function"
    raise PydanticCustomError("unknown_name", "{said}", {"said": said})
