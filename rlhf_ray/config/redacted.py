"""Secrets hidden in what is written, logged or printed; and foreign text without characters that steer a terminal.

A secret belongs in an environment variable that a config names (`token_env`, `api_key_env`). One that stands in the
config all the same (`https://user:password@host`, `?token=...`, `args: {api_key: ...}`) is used, and written nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
# No unbounded repetition before a fixed text: on a long text of letters that takes the square of its length.
_URL = re.compile(r"(://)([^\s\"'<>`]*)")
_WHOLE_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_ENDS_OF_SENTENCES = ":;,.!)}"
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")
_NAMES_A_SECRET = re.compile(
    r"token|(.*_)?(password|passwd|passphrase|secret|credentials?|authorization|api_?key|(access|secret|private)_key|"
    r"(api|access|auth|bearer|refresh|hf)_token)"
)


def redacted(text: str, *secrets: str) -> str:
    """The text with `***` for what may be secret in its URLs (user and password, values of the query, fragment), and
    for the `secrets` themselves, where somebody quotes them."""
    text = _URL.sub(_without_secrets, text)
    for secret in filter(None, secrets):
        text = text.replace(secret, HIDDEN)
    return text


def redacted_settings(value: Any) -> Any:
    """The same of settings: of values that are URLs, and of those whose name says that they are secret.

    A text with a URL in it (a system prompt, say) is no URL and stays.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, inner) else redacted_settings(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_settings(inner) for inner in value]
    return redacted(value) if isinstance(value, str) and _WHOLE_URL.fullmatch(value) else value


def redacted_texts(value: Any) -> Any:
    """`redacted` of every text in lists and mappings."""
    if isinstance(value, Mapping):
        return {key: redacted_texts(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_texts(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def legible(text: str) -> str:
    """Control characters, and others that print nothing, as escapes (`\\x1b`); ends of lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def hidden_in(settings: Any) -> list[str]:
    """The dotted names of what is hidden in settings that were written."""
    return list(_hidden(settings, ""))


def _hidden(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            inner_name = f"{name}.{key}" if name else str(key)
            if _is_secret(key, inner) and inner == HIDDEN:
                yield inner_name
            else:
                yield from _hidden(inner, inner_name)
    elif isinstance(value, str) and HIDDEN in value and _WHOLE_URL.fullmatch(value) and redacted(value) == value:
        yield name


def _is_secret(key: Any, value: Any) -> bool:
    named = isinstance(key, str) and _NAMES_A_SECRET.fullmatch(key.lower().replace("-", "_"))
    return bool(named) and isinstance(value, str) and value != ""


def _without_secrets(found: re.Match[str]) -> str:
    url = found[2].rstrip(_ENDS_OF_SENTENCES)
    return found[1] + _rest_of_url(url) + found[2][len(url):]


def _rest_of_url(rest: str) -> str:
    """What follows `scheme://`."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    _, at, host = authority.rpartition("@")
    if not _HOST_AND_PORT.fullmatch(host):
        # What stands for the port is none, so a password goes on behind it: it holds a bare /, ? or #.
        if "@" in rest:
            return f"{HIDDEN}@{_rest_of_url(rest.rpartition('@')[2])}"
        host = HIDDEN
    path, *fragment = rest[len(authority):].split("#", maxsplit=1)
    path, *query = path.split("?", maxsplit=1)
    # All values: nobody can tell which of them is a secret.
    parts = [part.partition("=") for part in "".join(query).split("&")]
    named = [f"{name}={HIDDEN}" if equals else HIDDEN for name, equals, _ in parts]
    return (
        f"{HIDDEN + at if at else ''}{host}{path}" + (f"?{'&'.join(named)}" if query else "")
        + (f"#{HIDDEN}" if fragment else "")
    )  # fmt: skip
