"""Writes docs/settings.md: every setting of every command, its type, its default and its meaning.

See `make settings`; tests/test_settings.py holds the page to the schema.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config.algorithm import PRESETS
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.pipeline import PipelineConfig
from rlhf_ray.config.reward_server import RewardServerConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import section_in
from rlhf_ray.config.supervised import SCHEMAS

PAGE = Path(__file__).resolve().parent / "settings.md"
COMMANDS: dict[str, type[BaseModel]] = {
    "rl": RunConfig, **SCHEMAS, "eval": EvalRunConfig, "pairs": PairsConfig, "serve-reward": RewardServerConfig,
    "pipeline": PipelineConfig,
}  # fmt: skip
HEADER = """# Settings

Every setting of every command: of a YAML file, and of the command line as a dotted override (`learner.lr=1e-6`,
`rewards.0.weight=2`, `model.lora.r=8`; a value is YAML). `make settings` writes this page from the schema, and a test
holds it to that. An unknown setting is refused with the nearest one, or with what a name of TRL, verl, OpenRLHF or
LLaMA-Factory is called here; settings that contradict each other are refused together. `--dry-run` prints a file with
every default filled in.

Why the defaults are what they are, beside those of other tools: [defaults.md](defaults.md).
"""
NUMBERS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
PLACES = {"one": "", "list": ".0", "mapping": ".<name>"}
KINDS = {"one": "", "list": "list of ", "mapping": "mapping of names to "}
ROUND = 1 << 17  # from here on a power of two says more than its digits


def sections() -> dict[type[BaseModel], dict[str, list[str]]]:
    """Every section's class -> where it stands: dotted name -> commands."""
    found: dict[type[BaseModel], dict[str, list[str]]] = {}
    for command, schema in COMMANDS.items():
        for dotted, section in _below(schema, ""):
            found.setdefault(section, {}).setdefault(dotted, []).append(command)
    return found


def _below(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in schema.model_fields.items():
        section = section_in(field.annotation)
        if section is not None:
            dotted = f"{prefix}{name}{PLACES[_holds(field.annotation)]}"
            yield dotted, section
            yield from _below(section, f"{dotted}.")


def _holds(annotation: Any) -> str:
    """How many sections a setting of this type holds: "one", a "list" of them, or a "mapping" of names to them."""
    if get_origin(annotation) in (list, dict):
        return "list" if get_origin(annotation) is list else "mapping"
    return next((held for inner in get_args(annotation) if (held := _holds(inner)) != "one"), "one")


def page() -> str:
    lines = [HEADER]
    lines += ["| command | its settings |", "| --- | --- |"]
    lines += [f"| [`rlhf-ray {name}`](#rlhf-ray-{name}) | {_first(schema)} |" for name, schema in COMMANDS.items()]
    for command, schema in COMMANDS.items():
        lines += ["", f"## rlhf-ray {command}", "", *table(schema)]
    for section, places in sections().items():
        stands = "; ".join(f"`{dotted}` ({', '.join(commands)})" for dotted, commands in places.items())
        lines += ["", f"## {section.__name__}", "", f"{stands}. {_doc(section)}".rstrip(), "", *table(section)]
        if section.__name__ == "AlgorithmConfig":
            lines += ["", "What each `name` fills in, where the config says nothing else:", "", *presets()]
    return "\n".join(lines) + "\n"


def table(section: type[BaseModel]) -> list[str]:
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        kind = kind_of(field) if inner is None else f"[{inner.__name__}](#{inner.__name__.lower()})"
        if inner is not None:
            kind = KINDS[_holds(field.annotation)] + kind
        cells = [f"`{name}`", kind, default_of(field), field.description or (_first(inner) if inner else "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def presets() -> list[str]:
    lines = ["| name | settings |", "| --- | --- |"]
    for name, values in PRESETS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{key}: {_shown(value)}`' for key, value in values.items())} |")
    return lines


def kind_of(field: FieldInfo) -> str:
    """The type in words, with the bounds of a number."""
    bounds = {name: value for item in field.metadata for name in NUMBERS
              if (value := getattr(item, name, None)) is not None}  # fmt: skip
    words = _words(field.annotation)
    if words == "integer" and bounds.keys() & {"gt", "ge"} and bounds.keys() & {"lt", "le"}:
        lowest = bounds["ge"] if "ge" in bounds else bounds["gt"] + 1
        highest = bounds["le"] if "le" in bounds else bounds["lt"] - 1
        return f"{words}, {lowest} to {_integer(highest)}"
    return ", ".join([words, *(f"{NUMBERS[name]} {value:g}" for name, value in bounds.items())])


def _integer(value: int) -> str:
    for power, rest in ((value, ""), (value + 1, " - 1")):
        if power >= ROUND and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}{rest}"
    return str(value)


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_words(argument) for argument in arguments if argument is not type(None))
    if origin in (list, tuple):
        inner = [_words(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if origin is list else f"[{', '.join(inner)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", datetime: "date and time"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "empty"
    if isinstance(value, BaseModel):
        return ""
    return f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _doc(section: type[BaseModel]) -> str:
    """Its own docstring, as one paragraph; not one it inherits."""
    return " ".join(inspect.cleandoc(section.__doc__ or "").split()) if "__doc__" in vars(section) else ""


def _first(section: type[BaseModel]) -> str:
    return re.split(r"(?<=\.)\s", _doc(section), maxsplit=1)[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
