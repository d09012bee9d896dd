"""The sandboxed process that runs a sample: it loads the sample's code, then answers calls. It knows no test.

Whoever asks sends arguments and gets values back; what those ought to be is known elsewhere. So a sample that takes
over this process, as any can, gains no more than the right to answer wrongly.

Standard library only: `sandbox.py` passes this file's code into the sandbox.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import importlib
import io
import operator
import sys
import types
from collections.abc import Iterator

from rlhf_ray.rewards.code_seeds import sow
from rlhf_ray.rewards.code_wire import Decoder, Encoder, Unsendable, Wire

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any

_PRINTED = 1 << 20  # characters of one call that a test may look at

# What LeetCode's environment imports before a solution: name -> module. A sample's own definitions come later.
_PROVIDED = {
    "typing": "Any Callable Counter DefaultDict Deque Dict FrozenSet Generator Generic Iterable Iterator List Mapping "
    "NamedTuple Optional Sequence Set Tuple Type TypeVar Union",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile zip_longest",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 perm pi sqrt",
    "operator": "add and_ itemgetter attrgetter mul or_ sub xor",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "random": "choice randint randrange shuffle",
    "copy": "deepcopy",
    "dataclasses": "dataclass field",
    "fractions": "Fraction",
}
_NAMES = {name: module for module, names in _PROVIDED.items() for name in names.split()}
_MODULES = (
    "math re sys os json time random string heapq bisect itertools functools collections operator typing copy datetime"
)

# Operators of a sample's object, by the method that makes them work: what runs them here.
_UNARY = {
    "len": len, "iter": iter, "bool": bool, "int": int, "float": float, "complex": complex, "index": operator.index,
    "abs": abs, "neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "hash": hash, "str": str,
    "repr": repr, "reversed": reversed, "bytes": bytes,
}  # fmt: skip
_ARITHMETIC = [
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor",
]  # fmt: skip
_BINARY = {name: getattr(operator, f"__{name}__") for name in (*_ARITHMETIC, *[f"i{name}" for name in _ARITHMETIC])}
_BINARY |= {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "contains")}
_BINARY |= {"getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem}
_METHODS = {
    "round": round, "format": format, "divmod": divmod, "getattr": getattr, "setattr": setattr, "delattr": delattr,
    "dir": dir, "isinstance": isinstance, "issubclass": issubclass, "type": type,
    "call": lambda function, *args, **named: function(*args, **named),
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager, error: type(manager).__exit__(manager, type(error) if error else None, error, None),
    "copy": copy.copy, "deepcopy": copy.deepcopy,
    "await": lambda awaitable: _awaited(awaitable),
}  # fmt: skip
_OPERATIONS = {**_UNARY, **_BINARY, **_METHODS}
_OFFERED = [f"__{name}__" for name in (*_UNARY, *_BINARY, "round", "format", "divmod", "call", "next", "enter", "exit")]
_OFFERED += [*[f"__r{name}__" for name in _ARITHMETIC], "__await__"]


def main(job: dict) -> None:
    """Load `job["program"]`, say so, and answer until nobody asks any more."""
    server = Server(Wire(job["reading"], job["writing"]))
    error = server.load(job["program"], job["leetcode"], job["outside"])
    server.wire.send({"loaded": error is None, "error": error})
    with contextlib.suppress(EOFError):
        while True:
            server.wire.send(server.answer(server.wire.receive()))


class Server:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.module = types.ModuleType("solution")
        self.kept: list[Any] = []  # objects of the sample that the other side refers to by their place here
        self._places: dict[int, int] = {}
        self._outside: dict[int, Any] = {}

    def load(self, program: str, leetcode: bool, outside: list[str]) -> str | None:
        """What went wrong, if anything did. `outside`: classes of the test, by name."""
        sys.modules["solution"] = self.module
        scope = self.module.__dict__
        scope.update({name: OutsideClass(self, name) for name in outside})
        try:
            code = compile(program, "<sample>", "exec")
            if leetcode:
                _provide(code, scope)
            exec(code, scope)
        except SystemExit:
            return None  # what stands before is defined, and is what the tests look at
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:500]
        return None

    def answer(self, message: dict) -> dict:
        try:
            return self._done(message)
        except Unsendable as error:
            return {"unsendable": str(error)}
        except BaseException as error:  # whatever the sample raises is its answer
            return {"raised": self._raised(error)}

    def _done(self, message: dict) -> dict:
        operation, printed = message["do"], io.StringIO()
        if operation == "names":
            builtins.input = self._input
            return {"value": self._names()}
        decoder = Decoder(self._taken)
        if operation == "function":
            return {"value": Encoder(self._handle).encode(self._function(message["name"], message["calls"], decoder))}
        operands = [decoder.decode(part) for part in message["with"]]
        named = {name: decoder.decode(part) for name, part in message.get("named", {}).items()}
        before = [container.copy() for container in decoder.containers]
        sow(Decoder(self._taken).decode(message.get("seeds")) or {})
        with contextlib.redirect_stdout(_Capped(printed)) if message.get("print") else contextlib.nullcontext():
            if operation == "next":
                return self._next(*operands)
            value = _OPERATIONS[operation](*operands, **named)
        reply = {"value": Encoder(self._handle).encode(value), "printed": printed.getvalue()}
        if operation == "call" and (changed := self._changed(decoder.containers, before)):
            reply["changed"] = changed
        return reply

    def _names(self) -> dict:
        given: dict[str, Any] = {}
        for name, value in self.module.__dict__.items():
            if name.startswith("__") or isinstance(value, (OutsideClass, types.ModuleType)):
                continue
            with contextlib.suppress(Exception):  # of no use to a test, then
                given[name] = self._given(value)
        return given

    def _function(self, name: str, calls: list, decoder: Decoder) -> Any:
        """The test's function, or that method of a new `Solution`. `calls`: readings of the arguments, best first."""
        scope = self.module.__dict__
        solution = scope.get("Solution")
        if isinstance(solution, type) and hasattr(solution, name):
            function = getattr(solution(), name)
        elif name in scope:
            function = scope[name]
        else:
            raise NameError(f"name {name!r} is not defined")
        readings = [(decoder.decode(args), decoder.decode(named)) for args, named in calls]
        args, named = readings[0]
        if len(readings) > 1:
            args, named = next((reading for reading in readings if _fits(function, *reading)), readings[0])
        return function(*args, **named)

    def _next(self, iterator: Any, most: int) -> dict:
        """Up to `most` items; `then` is what came instead of a further one."""
        items: list[Any] = []
        then: Any = None
        try:
            while len(items) < most:
                items.append(self._given(next(iterator)))
        except StopIteration:
            then = "end"
        except BaseException as error:
            then = {"raised": self._raised(error)}
        return {"items": items, "then": then}

    def _changed(self, containers: list, before: list) -> list:
        """(place, contents now) of the arguments that the call changed in place."""
        places = [i for i, (now, then) in enumerate(zip(containers, before, strict=True)) if not _same(now, then)]
        encoder = Encoder(self._handle, containers)
        try:
            return [[place, encoder.contents(containers[place])] for place in places]
        except (Unsendable, RecursionError):
            return []

    def _given(self, value: Any) -> Any:
        return Encoder(self._handle).encode(value)

    def _handle(self, value: Any) -> Any:
        """A reference for what is not plain data, with what the other side needs to stand in for it."""
        if isinstance(value, Outside):
            return {"yours": value.place}
        kind = type(value)
        if kind is type and getattr(builtins, value.__name__, None) is value:
            return {"builtin": value.__name__}
        if isinstance(value, types.ModuleType):
            raise Unsendable(f"the module {value.__name__} is no value")
        place = self._places.get(id(value))
        if place is None:
            place = self._places[id(value)] = len(self.kept)
            self.kept.append(value)
        if issubclass(kind, type) and issubclass(value, BaseException):
            return {"error class": self._error_class(value)}
        about = {"place": place, "has": [name for name in _OFFERED if _defines(kind, name)], "type": kind.__name__}
        about["class"] = issubclass(kind, type)
        for base in (tuple, str, int, float, list, dict, set, frozenset, bytes):
            if issubclass(kind, base):
                # The base's own view of it: methods that the sample has overridden have no say in what it equals.
                return {"kind of": [self._given(_plain(base, value)), about]}
        return {"handle": about}

    def _error_class(self, kind: type) -> dict:
        place = self._places.setdefault(id(kind), len(self.kept))
        if place == len(self.kept):
            self.kept.append(kind)
        bases = [self._error_class(base) for base in kind.__bases__ if issubclass(base, BaseException)]
        own = kind.__module__.partition(".")[0] not in sys.stdlib_module_names
        return {"place": place, "name": kind.__qualname__, "module": "" if own else kind.__module__,
                "bases": bases if own else []}  # fmt: skip

    def _raised(self, error: BaseException) -> dict:
        told: dict[str, Any] = {"class": self._error_class(type(error)), "args": None, "text": "", "type": ""}
        with contextlib.suppress(BaseException):
            told["text"] = str(error)[:2000]
            told["type"] = type(error).__name__
            told["args"] = self._given(tuple(error.args))
            told["fields"] = {name: self._given(value) for name, value in vars(error).items()}
        return told

    def _taken(self, given: dict) -> Any:
        """The value of what only this process, or only the other one, has."""
        ((kind, content),) = given.items()
        if kind == "mine":
            return self.kept[content]
        if kind == "builtin":
            return getattr(builtins, content)
        if kind == "import":
            return operator.attrgetter(content[1])(importlib.import_module(content[0]))
        if kind == "error":
            return getattr(builtins, content[0])(*content[1])
        place, sort = content
        if place not in self._outside:
            kinds = {"call": OutsideFunction, "next": OutsideIterator}
            self._outside[place] = kinds.get(sort, OutsideObject)(self, place)
        return self._outside[place]

    def ask(self, operation: str, *operands: Any, **named: Any) -> Any:
        """Something of the test's own process: a function that it passed in, an object of a class of its own."""
        given = [self._given(operand) for operand in operands]
        self.wire.send({"do": operation, "with": given, "named": {k: self._given(v) for k, v in named.items()}})
        while "do" in (reply := self.wire.receive()):
            self.wire.send(self.answer(reply))
        if "raised" in reply:
            name, args = reply["raised"]
            raise getattr(builtins, name, Exception)(*args)
        return Decoder(self._taken).decode(reply["value"])

    def _input(self, prompt: object = "") -> str:
        return self.ask("input", str(prompt))


class Outside:
    """Stands for something in the test's process; `place` is its number there."""

    def __init__(self, server: Server, place: int) -> None:
        self.__dict__.update(_server=server, place=place)


class OutsideFunction(Outside):
    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._server.ask("call", self, *args, **named)


class OutsideIterator(Outside):
    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        return self._server.ask("next", self)


class OutsideObject(OutsideFunction):
    def __getattr__(self, name: str) -> Any:
        return self._server.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._server.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> Any:
        return self is other or self._server.ask("eq", self, other)

    def __hash__(self) -> int:
        return self._server.ask("hash", self)


class OutsideClass(Outside):
    """A class of the test's, by its name: `place`."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._server.ask("make", self.place, *args, **named)


def _forward(name: str) -> Any:
    return lambda self, *operands: self._server.ask(name, self, *operands)


for _name in ("len", "iter", "bool", "str", "getitem", "setitem", "contains", "lt", "le", "gt", "ge", "add", "sub"):
    setattr(OutsideObject, f"__{_name}__", _forward(_name))


class _Capped(io.TextIOBase):
    """Standard output of a call, for a test that captures it."""

    def __init__(self, printed: io.StringIO) -> None:
        self.printed = printed

    def write(self, text: str) -> int:
        if self.printed.tell() < _PRINTED:
            self.printed.write(text)
        return len(text)


def _provide(code: types.CodeType, scope: dict) -> None:
    """Only the names that the sample mentions: importing everything would take longer than most samples."""
    for name in _mentioned(code):
        if name in _MODULES.split():
            scope[name] = importlib.import_module(name)
        elif name in _NAMES:
            scope[name] = getattr(importlib.import_module(_NAMES[name]), name)


def _mentioned(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _mentioned(constant)
    return names


def _fits(function: Any, args: list, named: dict) -> bool:
    import inspect  # slow to load, and seldom needed

    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    except ValueError:
        return True  # no signature to be had
    return True


def _same(now: Any, then: Any) -> bool:
    if hasattr(now, "tobytes"):  # numpy's array
        return now.shape == then.shape and now.tobytes() == then.tobytes()
    if isinstance(now, (set, bytearray)):
        return now == then
    if isinstance(now, dict):
        now, then = [*now.keys(), *now.values()], [*then.keys(), *then.values()]
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _defines(kind: type, name: str) -> bool:
    method = getattr(kind, name, None)
    return method is not None and method is not getattr(object, name, None)


def _plain(base: type, value: Any) -> Any:
    if base is dict:
        return dict(zip(dict.keys(value), dict.values(value), strict=True))
    if base in (int, float, str):
        return {int: int.__int__, float: float.__float__, str: lambda text: str.__str__(text)}[base](value)
    return base(base.__iter__(value))


def _awaited(awaitable: Any) -> Any:
    import asyncio

    async def wait() -> Any:
        return await awaitable

    return asyncio.run(wait())
