"""Ways to spoil a tree of mappings, lists and values, as JSON and YAML give them; rows and configs share these.

A mutation takes (a random generator, a tree that it may change) and returns the spoiled tree, or None where it does not
apply. What comes out depends on the generator and the tree alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutation = Callable[[Random, Any], Any]


def deep(depth: int) -> list[Any]:
    """[[[...]]]"""
    nested: list[Any] = []
    for _ in range(depth - 1):
        nested = [nested]
    return nested


# What stands in the place of a value. Both JSON and YAML can write all of them.
STRANGE: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "one": 1,
    "half": 0.5,
    "beyond 32 bits": 1 << 40,
    "beyond 64 bits": 1 << 70,
    "beyond a float": 10**400,
    "beyond what Python prints": 10**5000,
    "tiny": 5e-324,
    "huge": 1e308,
    "nan": float("nan"),
    "infinite": float("inf"),
    "empty text": "",
    "blank text": " \t\n ",
    "NUL": "a\0b",
    "half a character": "a\ud800b",
    "the other half": "\udc00",
    "invisible": "\ufeff\u200b\u2028\u202e",
    "bytes as text": "b'\\xff\\x00'",
    "emoji": "👩‍👩‍👧 ".strip(),
    "Chinese": "今天天气很好。",
    "control characters": "\x1b[31m\x07\r\x85",
    "number as text": "12",
    "null as text": "null",
    "broken JSON": '[{"role": "user", "content": ',
    "JSON list": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]',
    "JSON object": '{"a": {"b": [1, null]}}',
    "template": "{{ 7 * 7 }}{% for x in y %}",
    "special token": "<eos><|user|>\n",
    "long name": "n" * 5000,
    "long text": "word " * 20_000,
    "empty list": [],
    "empty object": {},
    "list of null": [None],
    "list of lists": [[], [[]]],
    "list of texts": ["a", "b"],
    "object": {"a": 1, "b": {"c": None}},
    "nested 60 deep": deep(60),
    "nested 900 deep": deep(900),
}


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below the root, in a fixed order."""

    def walk(node: Any) -> Iterator[tuple[Any, Any]]:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in list(keys):
            yield node, key
            yield from walk(node[key])

    return list(walk(tree))


def _swapped_for(value: Any) -> Mutation:
    def swap(random: Random, tree: Any) -> Any:
        found = places(tree)
        if not found:
            return None
        container, key = random.choice(found)
        container[key] = copy.deepcopy(value)
        return tree

    return swap


def _with_key(change: Callable[[Random, dict[Any, Any], Any], None]) -> Mutation:
    """`change` gets a mapping of the tree and one of its keys."""

    def mutate(random: Random, tree: Any) -> Any:
        found = [(node, key) for node, key in places(tree) if isinstance(node, dict)]
        if not found:
            return None
        change(random, *random.choice(found))
        return tree

    return mutate


def _renamed(name: Callable[[Random, str], Any]) -> Mutation:
    def rename(random: Random, node: dict[Any, Any], key: Any) -> None:
        items = [(name(random, str(key)) if k == key else k, value) for k, value in node.items()]
        node.clear()
        node.update(items)

    return _with_key(rename)


def _typo(random: Random, name: str) -> str:
    at = random.randrange(len(name) or 1)
    return random.choice([name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name[::-1]])


def _extra(random: Random, node: dict[Any, Any], _: Any) -> None:
    node[random.choice(["extra", "weight", "name", "tools", "id", "a.b", "", "\0", "键", "a\ud800"])] = copy.deepcopy(
        random.choice(list(STRANGE.values()))
    )


def _with_list(change: Callable[[Random, list[Any]], Any]) -> Mutation:
    def mutate(random: Random, tree: Any) -> Any:
        found = [node[key] for node, key in places(tree) if isinstance(node[key], list) and node[key]]
        if not found:
            return None
        change(random, random.choice(found))
        return tree

    return mutate


def _around(wrap: Callable[[Any], Any]) -> Mutation:
    def mutate(random: Random, tree: Any) -> Any:
        found = places(tree)
        if not found:
            return None
        container, key = random.choice(found)
        container[key] = wrap(container[key])
        return tree

    return mutate


def _exchange(random: Random, tree: Any) -> Any:
    found = places(tree)
    if len(found) < 2:
        return None
    (one, a), (other, b) = random.sample(found, 2)
    if one is other:
        one[a], one[b] = one[b], one[a]
        return tree
    one[a] = copy.deepcopy(other[b])  # copied: a value moved below itself would be a circle
    return tree


STRUCTURAL: dict[str, Mutation] = {
    **{f"a value is {name}": _swapped_for(value) for name, value in STRANGE.items()},
    "a key is missing": _with_key(lambda _, node, key: node.pop(key)),
    "a key has a typo": _renamed(_typo),
    "a key is in capitals": _renamed(lambda _, name: name.upper()),
    "a key ends in a blank": _renamed(lambda _, name: name + " "),
    "a key is empty": _renamed(lambda *_: ""),
    "a key holds half a character": _renamed(lambda _, name: name + "\udfff"),
    "an unknown key": _with_key(_extra),
    "a value in a list": _around(lambda value: [value]),
    "a value in an object": _around(lambda value: {"value": value}),
    "a value as text": _around(str),
    "an item twice": _with_list(lambda random, items: items.append(copy.deepcopy(random.choice(items)))),
    "an item is missing": _with_list(lambda random, items: items.pop(random.randrange(len(items)))),
    "a list backwards": _with_list(lambda _, items: items.reverse()),
    "a list 20 times": _with_list(lambda _, items: items.extend(copy.deepcopy(items * 19))),
    "a value elsewhere": _exchange,
}
