"""Which calls in the text of a test keep what the sample's function has changed in its arguments.

Where a test looks at an argument after the call (`k = f(nums); assert nums[:k] == [1, 2]`), it must see the changes.
Where it computes from the argument what the call should have returned (`assert f(a) == sorted(a)`), it must not: a
sample could empty the list and return `[]`. Both are told apart by how the text uses an argument after the call:

- as a source: it is compared with something that the sample returned, or put into one calculation with it;
- pinned: as a whole, a slice or an item by a variable index, it is compared with what does not come from the sample.

Changes are kept unless the argument is a source and nowhere pinned. Statements are followed in the order of the text,
which is enough for tests. Standard library only: `sandbox.py` passes this file's code into the sandbox.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any

    Path = tuple[Any, ...]  # a["b"].c is ("a", "b", "c")
    Use = tuple[ast.Call, Any]  # a call, and the position or name of one of its arguments, or ALL

ALL = "*"
_PEELED = {"list", "tuple", "sorted", "set", "copy", "tolist", "deepcopy"}  # of a pinned argument
_COMPARISONS = {"array_equal", "array_equiv", "allclose", "isclose", "equal"}
_PASSED_ON = {"zip", "enumerate", "reversed", "iter"}  # their items are those of what they are given


def kept_arguments(tree: ast.Module) -> dict[ast.Call, tuple[Any, ...]]:
    """Call -> positions and names of the arguments that keep their changes, or `ALL`."""
    text = _Text(tree)
    _Scope(text, "").follow(tree.body)
    dropped = text.sourced - text.pinned
    while more := {
        use for use in text.uses - dropped - text.pinned
        if text.within[use[0]] in {getattr(call.func, "attr", getattr(call.func, "id", "")) for call, _ in dropped}
    }:  # fmt: skip
        dropped |= more  # a function of the test's that calls the sample, and whose own caller uses it as a source
    kept: dict[ast.Call, tuple[Any, ...]] = {}
    for call, key in text.uses - dropped:
        kept[call] = (*kept.get(call, ()), key)
    return kept


class _Text:
    """What is known of the whole text."""

    def __init__(self, tree: ast.Module) -> None:
        self.uses: set[Use] = set()
        self.sourced: set[Use] = set()
        self.pinned: set[Use] = set()
        self.within: dict[ast.Call, str] = {}  # the test's function in which a call stands
        nodes = list(ast.walk(tree))
        self.imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
            if getattr(node, "module", "") != "solution"
            for alias in node.names
        }  # fmt: skip
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self.own = {node.name for node in functions} | {n.name for n in nodes if isinstance(n, ast.ClassDef)}
        self.asking: set[str] = set()  # functions of the test's in which the sample is called
        while more := {function.name for function in functions if self._asks(function)} - self.asking:
            self.asking |= more

    def is_library(self, name: str) -> bool:
        return name in self.imported or name in sys.stdlib_module_names or name == "np"

    def _asks(self, function: ast.AST) -> bool:
        calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
        return any(self.sort(call.func, False) in ("sample", "asking") for call in calls)

    def sort(self, function: ast.expr, of_sample: bool) -> str:
        """What is called: the sample, a function of the test's that asks it, a comparison, or something else.

        `of_sample`: the object whose method it is came from the sample.
        """
        name, base = getattr(function, "attr", getattr(function, "id", "")), (_path(function) or ("",))[0]
        library = self.is_library(base)
        if (library or base == "self") and (name.startswith("assert") or name in _COMPARISONS):
            return "comparison"
        if name in self.asking:
            return "asking"
        if library or name in self.own:
            return "other"
        if isinstance(function, ast.Name):
            return "other" if hasattr(builtins, name) else "sample"
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
            return self.sort(function.value.func, of_sample)  # Solution().f
        return "sample" if of_sample or (base == "self" and name not in ("fail", "subTest")) else "other"


class _Seen:
    """What an expression depends on: arguments of earlier calls, and whether anything in it came from the sample."""

    def __init__(self, uses: Iterable[Use] = (), came: bool = False) -> None:
        self.uses, self.came = set(uses), came

    def add(self, other: _Seen) -> _Seen:
        self.uses |= other.uses
        self.came |= other.came
        return self


class _Scope:
    def __init__(self, text: _Text, function: str, outer: _Scope | None = None) -> None:
        self.text, self.function = text, function
        self.holds: dict[Path, set[Use]] = dict(outer.holds) if outer else {}
        self.came: set[Path] = set(outer.came) if outer else set()
        self.sources: dict[Path, set[Path]] = dict(outer.sources) if outer else {}

    # ---- statements -------------------------------------------------------------------------------------------

    def follow(self, statements: Iterable[ast.AST]) -> None:
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = _Scope(self.text, node.name, self)
                for argument in ast.walk(node.args):
                    if isinstance(argument, ast.arg):
                        inner.forget((argument.arg,))
                inner.follow(node.body)
            elif isinstance(node, ast.ClassDef):
                _Scope(self.text, self.function, self).follow(node.body)
            elif isinstance(node, ast.Assign):
                seen = self.read(node.value)
                for target in node.targets:
                    self.bind(target, node.value, seen)
                    self.link(target, node.targets[0])
            elif isinstance(node, (ast.For, ast.AsyncFor)):
                self.bind_items(node.target, node.iter)
                self.follow([*node.body, *node.orelse])
            elif isinstance(node, ast.Assert):
                self.read(node.test)
            else:
                self._follow_parts(node)

    def _follow_parts(self, node: ast.AST) -> None:
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            seen = self.read(node.value)
            if isinstance(node, ast.AugAssign):
                seen.add(self.read(node.target))
            self.bind(node.target, node.value, seen)
            return
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.read(part)
            elif isinstance(part, ast.withitem):
                seen = self.read(part.context_expr)
                if part.optional_vars is not None:
                    self.bind(part.optional_vars, part.context_expr, seen)
            else:
                self.follow([part])

    def bind(self, target: ast.expr, value: ast.expr, seen: _Seen) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            for i, part in enumerate(target.elts):
                one = values[i] if len(values) == len(target.elts) else None
                self.bind(part, one or value, self.read(one) if one is not None else seen)
            return
        path = _path(target.value if isinstance(target, ast.Starred) else target)
        if path is None:
            self.put_into(target, seen)
            return
        self.forget(path)
        if seen.uses:
            self.holds[path] = set(seen.uses)
        if seen.came:
            self.came.add(path)
        self.sources[path] = set(_paths(value))
        self.link(value, target)

    def put_into(self, target: ast.expr, seen: _Seen) -> None:
        """`rows[i] = value`, `rows.append(value)`"""
        while _path(target) is None and isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if (path := _path(target)) is not None:
            self.holds[path] = self.holds.get(path, set()) | seen.uses
            self.came |= {path} if seen.came else set()

    def link(self, one: ast.expr, other: ast.expr) -> None:
        """Two names of one value."""
        path, same = _path(one), _path(other)
        if path is not None and same is not None:
            self.sources[path] = self.sources.get(path, set()) | {same}
            self.sources[same] = self.sources.get(same, set()) | {path}

    def bind_items(self, target: ast.expr, items: ast.expr) -> None:
        seen = self.read(items)
        given = items.args if isinstance(items, ast.Call) and getattr(items.func, "id", "") in _PASSED_ON else []
        if given and isinstance(target, ast.Tuple) and items.func.id == "enumerate" and len(target.elts) == 2:
            self.bind(target.elts[1], given[0], self.read(given[0]))
        elif given and isinstance(target, ast.Tuple) and len(given) == len(target.elts):
            for part, value in zip(target.elts, given, strict=True):
                self.bind(part, value, self.read(value))
        else:
            self.bind(target, given[0] if len(given) == 1 else items, seen)

    def forget(self, path: Path) -> None:
        for known in (self.holds, self.sources):
            for other in [other for other in known if other[: len(path)] == path]:
                del known[other]
        self.came = {other for other in self.came if other[: len(path)] != path}

    # ---- expressions ------------------------------------------------------------------------------------------

    def read(self, node: ast.AST) -> _Seen:
        """Where a value is only an index it is not counted: `nums[:k]` is of `nums`."""
        if (path := _path(node)) is not None:
            return self._of(path)
        if isinstance(node, ast.Subscript):
            self.read(node.slice)
            return self.read(node.value)
        if isinstance(node, ast.Call):
            return self._read_call(node)
        if isinstance(node, ast.Compare):
            seen, sides = _Seen(), [node.left, *node.comparators]
            for left, right in zip(sides, sides[1:], strict=False):
                seen.add(self.compare(left, right))
            return seen
        if isinstance(node, ast.Lambda):
            before = set(self.text.uses)
            seen = self.read(node.body)
            self.text.sourced |= self.text.uses - before  # nobody knows what it will be called with
            return seen
        if isinstance(node, ast.NamedExpr):
            seen = self.read(node.value)
            self.bind(node.target, node.value, seen)
            return seen
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for part in node.generators:
                self.bind_items(part.target, part.iter)
        seen = _Seen()
        for part in ast.iter_child_nodes(node):
            if not isinstance(part, (ast.Constant, ast.expr_context, ast.arguments)):  # of the first there may be many
                seen.add(self.read(part))
        return seen

    def _of(self, path: Path) -> _Seen:
        """A part of what was passed is passed too, and so is what holds it."""
        uses = [uses for other, uses in self.holds.items() if _touch(path, other)]
        return _Seen(set().union(*uses), any(_touch(path, other) for other in self.came))

    def _read_call(self, node: ast.Call) -> _Seen:
        seen = self.read(node.func.value) if isinstance(node.func, ast.Attribute) else _Seen()
        sort = self.text.sort(node.func, seen.came)
        if sort == "comparison" and len(node.args) > 1:
            self.compare(node.args[0], node.args[1])
        given = [*((i, arg) for i, arg in enumerate(node.args)), *((word.arg, word.value) for word in node.keywords)]
        for _, argument in given:
            seen.add(self.read(argument))
        if seen.uses and seen.came and sort in ("other", "asking") and getattr(node.func, "id", "") != "print":
            self.text.sourced |= seen.uses
        if sort not in ("sample", "asking"):
            base = (_path(node.func) or ("",))[0]
            if isinstance(node.func, ast.Attribute) and not self.text.is_library(base) and base != "self":
                self.put_into(node.func.value, seen)
            return seen
        unknown = any(isinstance(argument, ast.Starred) or key is None for key, argument in given)
        self.text.within[node] = self.function
        for key, argument in given:
            use = (node, ALL if unknown else key)
            for path in _paths(argument.value if isinstance(argument, ast.Starred) else argument):
                self.text.uses.add(use)
                for same in self._all_sources(path):
                    self.holds[same] = self.holds.get(same, set()) | {use}
        return _Seen(came=True)

    def _all_sources(self, path: Path) -> set[Path]:
        found, left = {path}, [path]
        while left:
            for more in self.sources.get(left.pop(), set()) - found:
                found.add(more)
                left.append(more)
        return found

    def compare(self, left: ast.expr, right: ast.expr) -> _Seen:
        rows = (ast.Tuple, ast.List)
        if isinstance(left, rows) and isinstance(right, rows) and len(left.elts) == len(right.elts):
            seen = _Seen()
            for one, other in zip(left.elts, right.elts, strict=True):
                seen.add(self.compare(one, other))
            return seen
        ours, theirs = self.read(left), self.read(right)
        if (ours.came or theirs.came) and (ours.uses or theirs.uses):
            self.text.sourced |= ours.uses | theirs.uses
        for side, seen, other in ((left, ours, theirs), (right, theirs, ours)):
            if not (other.uses or other.came or seen.came) and _is_whole(side):
                self.text.pinned |= seen.uses
        return ours.add(theirs)


def _is_whole(node: ast.expr) -> bool:
    """An argument, all of it or a slice, perhaps sorted; an item by a constant index says little of the others."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        parts = node.args[:1] or [getattr(node.func, "value", node)]
        return name in _PEELED and parts[0] is not node and _is_whole(parts[0])
    if isinstance(node, ast.Subscript):
        by_name = any(isinstance(part, ast.Name) for part in ast.walk(node.slice))
        return (isinstance(node.slice, ast.Slice) or by_name) and _is_whole(node.value)
    return isinstance(node, (ast.Name, ast.Attribute))


def _path(node: ast.AST) -> Path | None:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (base := _path(node.value)):
        return (*base, node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and (base := _path(node.value)):
        return (*base, node.slice.value)
    return None


def _paths(node: ast.AST) -> Iterator[Path]:
    """Names whose values an expression passes on as they are; a call's or a slice's value is another."""
    if (path := _path(node)) is not None:
        yield path
    elif isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice):
        yield from _paths(node.value)
    elif isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Starred, ast.IfExp, ast.BoolOp, ast.NamedExpr)):
        for part in ast.iter_child_nodes(node):
            yield from _paths(part)


def _touch(one: Path, other: Path) -> bool:
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]
