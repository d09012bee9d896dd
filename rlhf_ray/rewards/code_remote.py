"""What stands in the test's process for the sample's functions, classes and objects: every use of one is a question
to the sample's process, and what comes back is plain data or another stand-in.

A test must not be passed by an object that behaves as the test wishes. So the sample's own methods decide nothing
about plain data of the test's: a stand-in never equals or precedes plain data, an operator between the two must give
an object again, and no number or truth can be had from that object. Standard library only.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable, Iterable, Iterator

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any

_ARITHMETIC = [
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor",
]  # fmt: skip
_NUMBERS = ["len", "bool", "int", "float", "complex", "index", "abs", "round", "iter", "reversed", "bytes", "hash"]
# Methods of plain data that say yes or no about an argument or a kind, which is no way to tell a right answer.
_YES_OR_NO = {"startswith", "endswith"} | {n for t in (str, set, float) for n in dir(t) if n.startswith("is")}
_SINGLE_STEPS = 16  # items fetched one by one, so that what an iterator does besides is seen in time
_MOST_STEPS = 256


_set = object.__setattr__  # a stand-in's own attributes; all others are the sample's


class Remote:
    """Stands for an object of the sample's. Subclasses have the special methods that the object's class has."""

    __slots__ = ("_about", "_ahead", "_made", "_mixed", "_peer", "_steps", "_then")

    def __init__(self, peer: Any, about: dict) -> None:
        _set(self, "_peer", peer)
        _set(self, "_about", about)
        _set(self, "_made", False)  # the test made it itself, of a class that it names
        _set(self, "_mixed", False)  # an operator made it out of plain data of the test's
        _set(self, "_ahead", collections.deque())  # of an iterator: items fetched already
        _set(self, "_then", None)
        _set(self, "_steps", 0)

    def _stands_for(self) -> int:
        return self._about["place"]

    def _ask(self, operation: str, *operands: Any, **options: Any) -> Any:
        return self._peer.ask(operation, self, *operands, **options)

    def __getattr__(self, name: str) -> Any:
        if name in _YES_OR_NO and not self._made and not self._about["class"]:
            raise AttributeError(f"{name}: the sample gave an object of a class of its own instead of plain data")
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("delattr", name)

    @property
    def __class__(self) -> Any:
        known = {"generator": types.GeneratorType, "function": types.FunctionType, "coroutine": types.CoroutineType}
        return known.get(self._about["type"], type(self))

    @property
    def __doc__(self) -> Any:
        return self._ask("getattr", "__doc__")

    def __copy__(self) -> Any:
        return self._ask("copy")

    def __deepcopy__(self, memo: dict) -> Any:
        return self._ask("deepcopy")

    def __dir__(self) -> Iterable[str]:
        return self._ask("dir")

    def __instancecheck__(self, value: Any) -> bool:
        return self._ask_of_class("isinstance", value)

    def __subclasscheck__(self, value: Any) -> bool:
        return self._ask_of_class("issubclass", value)

    def _ask_of_class(self, question: str, value: Any) -> bool:
        return self._peer.ask(question, value, self) is True

    def __mro_entries__(self, bases: tuple) -> tuple:
        self._peer.cannot("the test derives a class from one of the sample's, which lies in another process")

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __format__(self, how: str) -> str:
        return str(self._ask("format", how))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        # Two objects of the sample's are its own affair; what plain data equals is not.
        return isinstance(other, Remote) and "__eq__" in self._about["has"] and self._ask("eq", other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__


def _number(name: str) -> Callable:
    def method(self: Remote, *options: Any) -> Any:
        if self._mixed:
            raise TypeError(f"{name}: the sample's object was computed with plain data, which only plain data may be")
        return self._ask(name, *options)

    return method


def _sign(name: str) -> Callable:
    return lambda self: _mixed_as(self._ask(name), self._mixed)


def _arithmetic(name: str, *, reflected: bool = False) -> Callable:
    def method(self: Remote, other: Any) -> Any:
        mixed = self._mixed or not isinstance(other, Remote) or other._mixed
        result = self._peer.ask(name, *((other, self) if reflected else (self, other)))
        return _mixed_as(result, mixed)

    return method


def _in_place(name: str) -> Callable:
    def method(self: Remote, other: Any) -> Any:
        made = self._made
        result = self._ask(name, other)
        if result is self and made:
            _set(self, "_made", True)
            return self
        return _mixed_as(result, self._mixed or not isinstance(other, Remote) or other._mixed)

    return method


def _mixed_as(result: Any, mixed: bool) -> Any:
    if mixed and not isinstance(result, Remote):
        raise TypeError("an operator between the sample's object and plain data gave plain data")
    if mixed:
        _set(result, "_mixed", True)
    return result


def _order(name: str) -> Callable:
    return lambda self, other: self._ask(name, other) is True if isinstance(other, Remote) else NotImplemented


def _contains(self: Remote, item: Any) -> bool:
    if isinstance(item, Remote) or self._made:
        return self._ask("contains", item) is True
    return any(each is item or each == item for each in iter(self))


def _call(self: Remote, *args: Any, **named: Any) -> Any:
    return _call_keeping(self, (), args, named)


def _call_keeping(self: Remote, keep: tuple, args: tuple, named: dict) -> Any:
    result = self._ask("call", *args, named=named, keep=keep)
    if self._about.get("named") and self._about["class"] and isinstance(result, Remote):
        _set(result, "_made", True)
    return result


def _next(self: Remote) -> Any:
    if not self._ahead and self._then is None:
        steps = 1 if self._steps < _SINGLE_STEPS else min(self._steps, _MOST_STEPS)
        reply = self._ask("next", steps)
        self._ahead.extend(map(self._peer.received, reply["items"]))
        _set(self, "_then", reply["then"])
        _set(self, "_steps", self._steps + len(self._ahead))
    if self._ahead:
        return self._ahead.popleft()
    then = self._then
    if then == "end":
        raise StopIteration
    _set(self, "_then", "end")
    raise self._peer.error(then["raised"]) if then else StopIteration


def _await(self: Remote) -> Iterator:
    yield from ()
    return self._ask("await")


_METHODS: dict[str, Callable] = {
    **{f"__{name}__": _number(name) for name in _NUMBERS},
    **{f"__{name}__": _sign(name) for name in ("neg", "pos", "invert")},
    **{f"__{name}__": _arithmetic(name) for name in (*_ARITHMETIC, "divmod")},
    **{f"__r{name}__": _arithmetic(name, reflected=True) for name in _ARITHMETIC},
    **{f"__i{name}__": _in_place(f"i{name}") for name in _ARITHMETIC},
    **{f"__{name}__": _order(name) for name in ("lt", "le", "gt", "ge")},
    "__contains__": _contains,
    "__call__": _call,
    "__next__": _next,
    "__await__": _await,
    "__getitem__": lambda self, key: self._ask("getitem", key),
    "__setitem__": lambda self, key, value: self._ask("setitem", key, value),
    "__delitem__": lambda self, key: self._ask("delitem", key),
    "__enter__": lambda self: self._ask("enter"),
    "__exit__": lambda self, kind, error, trace: self._ask("exit", error),
}
_CLASSES: dict[frozenset, type] = {}


def stand_in(peer: Any, about: dict) -> Remote:
    """For an object that the sample's process has told about."""
    has = frozenset(about["has"])
    if has not in _CLASSES:
        methods = {name: method for name, method in _METHODS.items() if name in has}
        _CLASSES[has] = type("Remote", (Remote,), {**methods, "__doc__": vars(Remote)["__doc__"], "__slots__": ()})
    # Only what is expected: the sample's process writes what it likes.
    return _CLASSES[has](peer, {key: about[key] for key in ("place", "has", "type", "class")})


def derived(peer: Any, plain: Any, about: dict) -> Any:
    """For an object of a class of the sample's that derives from a plain one: the plain value, which alone decides
    what it equals, with the sample's attributes beside it.
    """
    base = type(plain)
    if base not in (int, float, str, bytes, tuple, list, dict, set, frozenset):
        raise TypeError(f"{base.__name__} is no plain type")
    if base not in _DERIVED:
        methods = {"__getattr__": _derived_attribute, "_stands_for": lambda self: self.__dict__["_about"]["place"]}
        _DERIVED[base] = type(base.__name__, (base,), methods)
    made = _DERIVED[base](plain)
    made.__dict__.update(_peer=peer, _about=about)
    return made


_DERIVED: dict[type, type] = {}


def _derived_attribute(self: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return self.__dict__["_peer"].ask("getattr", self, name)


def type_of(value: Any, *more: Any) -> Any:
    """`type`, as a test means it: of a stand-in the sample's own class."""
    if more or not hasattr(type(value), "_stands_for"):
        return type(value, *more)
    return value._peer.ask("type", value)


def keeping_changes(function: Any, keys: tuple) -> Any:
    """`function`, whose call keeps the changes in those of its arguments."""
    if not isinstance(function, Remote):
        return function
    return lambda *args, **named: _call_keeping(function, keys, args, named)
