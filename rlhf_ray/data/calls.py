"""Tool calls and the schemas of tools, in the one form that chat templates read: OpenAI's, with objects for arguments.

Objects in them have no nulls: tables are padded with these, and so is JSON that was written from a table. JSON text
keeps its own. Complaints name no place: the row's reader (data/columns.py) adds file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rlhf_ray.data.values import from_json, plain, shown, without_padding
from rlhf_ray.errors import DataError

_CALL = 'write {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}'
_TOOL = 'write {"type": "function", "function": {"name": "f", "description": "...", "parameters": {...}}}'


def tools_of(value: Any, unused: Counter[str] | None = None) -> tuple[Mapping[str, Any], ...]:
    """JSON schemas of tools, from a list or its JSON text; ShareGPT's bare `{"name": ...}` gets OpenAI's wrapping.

    `unused` counts those whose nulls are taken away; None: nulls stay.
    """
    if isinstance(value, str):
        value, unused = from_json(value), None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"is {shown(value)}, not a list of tools; {_TOOL} in a list")
    return tuple(_tool(item, unused) for item in value)


def calls_of(value: Any, unused: Counter[str] | None = None) -> list[dict[str, Any]]:
    """The tool calls of a message, from a list, one object, or the JSON text of either.

    Arguments are objects here, as templates want them: OpenAI's API gives them as JSON text. For `unused` see
    `tools_of`.
    """
    if isinstance(value, str):
        value, unused = from_json(value), None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"holds tool calls that are {shown(value)}, not a list of calls; {_CALL} in a list")
    return [_call(item, unused) for item in value]


def _tool(item: Any, unused: Counter[str] | None) -> dict[str, Any]:
    tool = _object(item, "tool", _TOOL, "tools[]", unused)
    if "function" not in tool:
        if tool.get("type", "function") != "function":
            return tool  # a tool that is built into a model (`{"type": "web_search"}`): the template knows it or not
        tool = {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
    _check_named(tool["function"], "tool", _TOOL)
    return {"type": "function", **tool}


def _call(item: Any, unused: Counter[str] | None) -> dict[str, Any]:
    call = _object(item, "tool call", _CALL, "messages[].tool_calls[]", unused)
    if "function" not in call:
        outer = {key: call.pop(key) for key in ("id", "type", "index") if key in call}
        call = {**outer, "function": call}
    function = call["function"]
    _check_named(function, "tool call", _CALL)
    given = function.get("arguments", function.get("parameters"))
    arguments = _arguments(given, function["name"])
    others = {key: value for key, value in function.items() if key not in ("arguments", "parameters")}
    return {"type": "function", **call, "function": {**others, "arguments": arguments}}


def _arguments(given: Any, name: str) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = plain(from_json(given)) if given.strip() else {}
        except DataError as error:
            raise DataError(f"holds a call of {name!r} whose arguments are wrong: {error}; write an object") from error
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DataError(f"holds a call of {name!r} whose arguments are {shown(given)}, not an object; {_CALL}")
    return given


def _object(item: Any, what: str, example: str, name: str, unused: Counter[str] | None) -> dict[str, Any]:
    """A copy: of an object without its nulls, which `unused` counts, of JSON text with them."""
    is_text = isinstance(item, str)
    if is_text:
        item = from_json(item)
    if not isinstance(item, Mapping):
        raise DataError(f"holds a {what} that is {shown(item)}, not an object; {example}")
    given = plain(item)
    if is_text or unused is None:
        return given
    kept = without_padding(given)
    if kept != given:
        unused[f"{name} keys that are null"] += 1
    return kept


def _check_named(function: Any, what: str, example: str) -> None:
    if not isinstance(function, Mapping):
        raise DataError(f"holds a {what} whose function is {shown(function)}, not an object; {example}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"holds a {what} without a function's name; {example}")
