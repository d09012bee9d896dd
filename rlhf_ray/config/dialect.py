"""YAML as settings need it: plain values, numbers as people write them, nothing that grows without end or runs code."""

from __future__ import annotations

import re
from typing import Any

import yaml

DEEPEST = 64  # levels of brackets or indentation
MOST_VALUES = 100_000  # of a whole file, each alias counted as what it stands for
_WIDEST = 1 << 128  # the settings themselves have narrower bounds; sums of these are still numbers to Python and torch


class Loader(yaml.SafeLoader):
    """1e-6 is a number (YAML 1.1 wants 1.0e-6), a date is a text, and no key comes twice.

    What Python could not print or walk through later is refused here, where the line is known: aliases that contain
    themselves or multiply, deep nesting, numbers of thousands of digits, halves of a character.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._level = 0
        self._extent: dict[int, tuple[int, int]] = {}  # node -> (values, levels) in it, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._level += 1
        if self._level > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and id(node) not in self._extent:
            raise yaml.composer.ComposerError(None, None, "an alias of what it stands in: it would never end", mark)
        if not is_alias:
            self._extent[id(node)] = self._measured(node)
        values, levels = self._extent[id(node)]
        if values > MOST_VALUES or levels > DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"with its aliases it has more than {MOST_VALUES:,} values or {DEEPEST} levels", mark
            )
        return node

    def _measured(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        values, levels = zip((0, 0), *(self._extent[id(part)] for part in inner), strict=True)
        return 1 + sum(values), 1 + max(levels)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' comes twice; keep one of the two", key.start_mark
                )
            seen[key.value if isinstance(key, yaml.ScalarNode) else id(key)] = key
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # `!!int abc`, `!!bool maybe`, a number of 5,000 digits
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this cannot be read as a value of type {kind} ({error})", node.start_mark
            ) from error
        if isinstance(value, int) and abs(value) >= _WIDEST:
            raise yaml.constructor.ConstructorError(None, None, "an integer of more than 128 bits", node.start_mark)
        return value

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.isascii():
            value.encode()  # Raises for "\ud800": a half of a character, which no file and no terminal takes.
        return value


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads: the text '1e-6' in quotes."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}
for _name in ("timestamp", "binary", "set", "omap", "pairs"):  # no setting is one, and JSON has none of them
    Loader.add_constructor(f"tag:yaml.org,2002:{_name}", yaml.SafeLoader.construct_undefined)


def read(text: str) -> Any:
    """The value that is written in `text`. Raises yaml.YAMLError, which says where, or ValueError."""
    return yaml.load(text, Loader)


def write(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)
