"""The test's process and the sample's: what each of the two may know of the other's values.

The test asks, the sample's process (`code_sample.py`) answers with plain data or with references, for which stand-ins
(`code_remote.py`) are made here. In the other direction go plain data, and references to what a test passes in.
"""

from __future__ import annotations

import builtins
import collections
import operator
import sys
import threading

from rlhf_ray.rewards.code_changes import ALL
from rlhf_ray.rewards.code_remote import derived, stand_in
from rlhf_ray.rewards.code_seeds import Seeds
from rlhf_ray.rewards.code_wire import Decoder, Encoder, Unsendable, Wire

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any, NoReturn


class Gone(BaseException):
    """The sample's process has ended. No test catches this: the test is over."""


class Unforwardable(BaseException):
    """The test asks for something that two processes cannot do. Says nothing about the sample."""


class Peer:
    """The sample's process, as seen from the test's."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.gone = False
        self.limitation: Unforwardable | None = None
        self.used = 0
        self.scope: dict[str, Any] = {}  # the test's names
        self.test_classes: set[str] = set()
        self.seeds = Seeds()
        self._lent: list[Any] = []
        self._stand_ins: dict[int, Any] = {}
        self._errors: dict[int, type] = {}
        self._lock = threading.RLock()  # tests may call from several threads

    # ---- asking -----------------------------------------------------------------------------------------------

    def ask(self, operation: str, *operands: Any, named: dict | None = None, keep: tuple = ()) -> Any:
        """`keep`: positions, of a call's arguments, and names of those whose changes are kept, or `ALL`; all are where
        it gives None.
        """
        encoder = Encoder(self._lend)
        try:
            given = [encoder.encode(operand) for operand in operands[:1]]
            owner = [None] * len(encoder.containers)  # by which argument a list, dict or the like was first met
            for key, operand in enumerate(operands[1:]):
                given.append(encoder.encode(operand))
                owner += [key] * (len(encoder.containers) - len(owner))
            given_named = {}
            for name, value in (named or {}).items():
                given_named[name] = encoder.encode(value)
                owner += [name] * (len(encoder.containers) - len(owner))
        except Unsendable as error:
            self.cannot(str(error))
        captured = sys.stdout is not sys.__stdout__
        message = {"do": operation, "with": given, "named": given_named, "print": captured}
        if operation == "call" and (seeds := self.seeds.take()):
            message["seeds"] = Encoder(self._lend).encode(seeds)
        reply = self.exchange(message)
        if captured and operation != "next":
            sys.stdout.write(str(reply.get("printed", "")))
        if operation == "next":
            return reply
        value = self.received(reply["value"])
        if "changed" in reply:
            decoder = Decoder(self._take)
            decoder.containers = encoder.containers
            for place, contents in reply["changed"]:
                if value is None or ALL in keep or owner[place] in keep:
                    decoder.fill(encoder.containers[place], contents)
        return value

    def exchange(self, message: dict) -> dict:
        with self._lock:
            self.used += 1
            try:
                self.wire.send(message)
                while "do" in (reply := self.wire.receive()):
                    self.wire.send(self._answer(reply))
            except (EOFError, ValueError, RecursionError):
                self.gone = True
                raise Gone("the sample's process ended") from None
        if "unsendable" in reply:
            raise TypeError(f"the sample gave {reply['unsendable']}")
        if "raised" in reply:
            raise self.error(reply["raised"])
        return reply

    def cannot(self, why: str) -> NoReturn:
        """Kept: a test with a bare `except` may not hide it."""
        self.limitation = Unforwardable(why)
        raise self.limitation

    def received(self, given: Any) -> Any:
        """Raises TypeError for what is no value: the sample may write anything."""
        try:
            return Decoder(self._take).decode(given)
        except (ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            raise TypeError(f"the sample gave no value ({error})") from None

    # ---- what the sample has --------------------------------------------------------------------------------

    def _take(self, given: dict) -> Any:
        ((kind, content),) = given.items()
        if kind == "yours":
            return self._lent[content]
        if kind == "builtin" and isinstance(getattr(builtins, content, None), type):
            return getattr(builtins, content)
        if kind == "error class":
            return self._error_class(content)
        if kind == "handle":
            place = content["place"]
            if place not in self._stand_ins:  # one object, one stand-in: tests compare by `is`
                self._stand_ins[place] = stand_in(self, content)
            object.__setattr__(self._stand_ins[place], "_made", False)
            return self._stand_ins[place]
        if kind == "kind of":
            return derived(self, self.received(content[0]), content[1])
        raise ValueError(f"{kind!r} is no kind of value")

    def _error_class(self, about: dict) -> type[BaseException]:
        place = about["place"]
        if place not in self._errors:
            found = None
            library = about["module"].partition(".")[0]
            # Only what a test can have named; and none of those that a test's own tools understand as "skip me".
            if library in sys.stdlib_module_names and library != "unittest":
                found = getattr(sys.modules.get(about["module"]), about["name"], None)
            if not (isinstance(found, type) and issubclass(found, BaseException)):
                bases = tuple(map(self._error_class, about["bases"])) or (Exception,)
                found = type(about["name"].rpartition(".")[2], bases, {"_remote_place": place})
            self._errors[place] = found
        return self._errors[place]

    def error(self, told: dict) -> BaseException:
        try:
            kind = self._error_class(told["class"])
            args = self.received(told["args"]) or ()
            try:
                error = kind(*args)
            except TypeError:  # its own arguments differ from what it tells
                error = kind.__new__(kind)
                error.args = args
            for name, value in (told.get("fields") or {}).items():
                if not name.startswith("__"):
                    setattr(error, name, self.received(value))
            if str(error) != told["text"] and "_remote_place" in vars(kind):
                kind.__str__ = lambda error: error.__dict__.get("_text", BaseException.__str__(error))
                error.__dict__["_text"] = told["text"]
        except Exception as broken:
            return TypeError(f"the sample raised something that is no exception ({broken})")
        return error

    # ---- what the sample may use of the test --------------------------------------------------------------------

    def _lend(self, value: Any) -> Any:
        """The test's functions may be called, its iterators advanced, and the public names of objects of its own
        classes be used; nothing else leaves this process.
        """
        about = getattr(type(value), "_stands_for", None)
        if about is not None:
            return {"mine": about(value)}
        if isinstance(value, type) and "_remote_place" in vars(value):
            return {"mine": vars(value)["_remote_place"]}
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if getattr(builtins, name or " ", None) is value:
            return {"builtin": name}
        library = isinstance(module, str) and module in sys.stdlib_module_names and callable(value) and name
        if library and getattr(sys.modules.get(module), name, None) is value:
            return {"import": [module, name]}
        if isinstance(value, BaseException):
            known = next(kind for kind in type(value).__mro__ if getattr(builtins, kind.__name__, None) is kind)
            return {"error": [known.__name__, [str(arg) for arg in value.args]]}
        own = type(value).__module__ == "__main__"
        if not own and hasattr(value, "__next__"):
            return self._lent_as("next", value)
        if own:
            return self._lent_as("object", value)
        if callable(value):
            return self._lent_as("call", value)
        if isinstance(value, (str, int, float, list, dict, tuple, set)):  # of a class derived from it
            base = next(b for b in (str, int, float, list, dict, tuple, set) if isinstance(value, b))
            return Encoder(self._lend).encode(base(value))
        if isinstance(value, (collections.abc.KeysView, collections.abc.ValuesView, collections.abc.ItemsView)):
            return Encoder(self._lend).encode(list(value))
        raise Unsendable(f"the test passes a {type(value).__name__}, which cannot be passed to another process")

    def _lent_as(self, sort: str, value: Any) -> dict:
        for place, lent in enumerate(self._lent):
            if lent is value:
                return {"theirs": [place, sort]}
        self._lent.append(value)
        return {"theirs": [len(self._lent) - 1, sort]}

    def _answer(self, message: dict) -> dict:
        try:
            operands = [Decoder(self._take).decode(part) for part in message["with"]]
            named = {name: self.received(part) for name, part in message["named"].items()}
            return {"value": Encoder(self._lend).encode(self._use(message["do"], operands, named))}
        except (Gone, Unforwardable):
            raise
        except Unsendable as error:
            return {"raised": ["AttributeError", [str(error)]]}
        except BaseException as error:
            name = type(error).__name__
            return {"raised": [name if hasattr(builtins, name) else "Exception", [str(error)]]}

    def _use(self, operation: str, operands: list, named: dict) -> Any:
        if operation == "input":
            return builtins.input(*operands)  # a test may have replaced it
        if operation == "make" and operands[0] in self.test_classes:
            return self.scope[operands[0]](*operands[1:], **named)
        owner, *rest = operands
        if not any(owner is lent for lent in self._lent):
            raise TypeError("not an object of the test's")
        if operation == "call":
            return owner(*rest, **named)
        if operation == "next":
            return next(owner)
        if type(owner).__module__ != "__main__" or operation not in _LENDABLE:
            raise TypeError("not for the sample")
        if operation in ("getattr", "setattr") and str(rest[0]).startswith("_"):
            raise AttributeError(f"{rest[0]!r} is private")
        return _LENDABLE[operation](owner, *rest)


_LENDABLE = {"len": len, "iter": iter, "bool": bool, "str": str, "hash": hash, "getattr": getattr, "setattr": setattr}
_OPERATORS = ("getitem", "setitem", "contains", "eq", "lt", "le", "gt", "ge", "add", "sub")
_LENDABLE |= {name: getattr(operator, f"__{name}__") for name in _OPERATORS}
