"""The sandboxed process that runs tests written as Python text. The sample's code is not in it.

Names that the sample defines are stand-ins that ask the sample's own process; everything else, and above all every
comparison, happens here, and so does the verdict. Standard library only: `sandbox.py` passes this file's code into
the sandbox.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import sys
import types

from rlhf_ray.rewards.code_changes import ALL, kept_arguments
from rlhf_ray.rewards.code_peer import Gone, Peer
from rlhf_ray.rewards.code_remote import Remote, keeping_changes, type_of
from rlhf_ray.rewards.code_wire import Wire

TYPE_CHECKING = False  # `typing` itself takes longer to import than most samples to run
if TYPE_CHECKING:
    from typing import Any

_ALIASES = {"np": "numpy", "pd": "pandas"}


def main(job: dict) -> None:
    """Run one test text after the other, as they are asked for, in one set of names."""
    peer = Peer(Wire(job["sample_reading"], job["sample_writing"]))
    asked = Wire(job["reading"], job["writing"])
    judge = Judge(peer, job)
    asked.send(judge.meet_sample())
    with contextlib.suppress(EOFError):
        while True:
            asked.send(judge.verdict(asked.receive()["test"]))


class Judge:
    def __init__(self, peer: Peer, about: dict) -> None:
        """`about`: what `code_forms.about_texts` gave."""
        self.peer = peer
        self.mentioned, self.free = set(about["mentioned"]), set(about["free"])
        self.builtin_under_test = about["builtin_under_test"]
        # Tests may look themselves up by module: unittest does.
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        self.scope = peer.scope = module.__dict__
        peer.test_classes = set(about["outside"])
        self.scope.update(__type_of__=type_of, __keeping_changes__=keeping_changes)

    def meet_sample(self) -> dict:
        """Its names, as far as a test may mean the sample's."""
        try:
            loaded = self.peer.wire.receive()
            if not loaded["loaded"]:
                return {"loaded": False, "error": str(loaded["error"])}
            names = self.peer.exchange({"do": "names"})["value"]
        except (Gone, EOFError, ValueError, KeyError, RecursionError):
            return {"loaded": False, "error": "ended while it was loaded"}
        solution = types.ModuleType("solution")  # tests that import what they test
        for name, given in names.items():
            if hasattr(builtins, name) and name != self.builtin_under_test:
                continue  # what a test calls `abs` or `all` is not the sample's to define
            with contextlib.suppress(TypeError):
                solution.__dict__[name] = self.peer.received(given)
        for name, value in solution.__dict__.items():
            if isinstance(value, Remote) and name in self.mentioned and name[0].isupper():
                value._about["named"] = True
        sys.modules["solution"] = solution
        self.scope.update({name: value for name, value in solution.__dict__.items() if not name.startswith("__")})
        return {"loaded": True, "error": None}

    def verdict(self, text: str) -> dict:
        used, why = self.peer.used, ""
        try:
            self._run(text)
        except Gone as error:
            why = str(error)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"[:500]
        finally:
            sys.stdout = sys.__stdout__
        if self.peer.limitation is not None:
            return {"passed": False, "cannot": str(self.peer.limitation), "why": ""}
        if self.peer.gone:
            return {"passed": False, "gone": True, "why": why or "the sample's process ended"}
        if not why and self.peer.used == used:
            why = "the test came to its end without a use of the sample"
        return {"passed": not why, "why": why}

    def _run(self, text: str) -> None:
        tree = ast.parse(text)
        for name in _modules_used(tree) & self.free:
            with contextlib.suppress(ImportError):
                self.scope[name] = importlib.import_module(_ALIASES.get(name, name))
        if "unittest" in text:
            # It would end this process; the classes are run in any case.
            importlib.import_module("unittest").main = lambda *_, **__: None
        if "seed" in text:
            self.peer.seeds.watch("random")
            if "numpy" in text or "np." in text:
                self.peer.seeds.watch("numpy.random")
        exec(compile(_Rewritten(tree).visit(tree), "<tests>", "exec"), self.scope)
        if any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in tree.body):
            self._run_uncalled(tree)

    def _run_uncalled(self, tree: ast.Module) -> None:
        """pytest's and unittest's tests, which are only defined by their text."""
        import inspect  # slow to load, and seldom needed

        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
                function = self.scope.get(node.name)
                if node.name in loaded or not callable(function):
                    continue
                if any(p.default is p.empty for p in inspect.signature(function).parameters.values()):
                    self.peer.cannot(f"{node.name} takes arguments, and pytest's fixtures and parameters are not known")
                result = function()
                if inspect.iscoroutine(result):
                    importlib.import_module("asyncio").run(result)
            elif isinstance(node, ast.ClassDef) and isinstance(self.scope.get(node.name), type):
                self._run_class(self.scope[node.name])

    def _run_class(self, kind: type) -> None:
        unittest = sys.modules.get("unittest")
        if unittest is not None and issubclass(kind, unittest.TestCase):
            self._run_suite(unittest.defaultTestLoader.loadTestsFromTestCase(kind))
        elif kind.__name__.startswith("Test"):
            for name in [name for name in vars(kind) if name.startswith("test")]:
                getattr(kind(), name)()

    def _run_suite(self, suite: Any) -> None:
        import unittest

        result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
        if result.skipped or not result.wasSuccessful():
            problems = [*result.failures, *result.errors, *result.skipped]
            raise AssertionError(str(problems[0][1] if problems else "unexpected success")[-300:])


class _Rewritten(ast.NodeTransformer):
    """A call keeps what it changes in its arguments where `kept_arguments` says so, and as a statement, whose value
    nobody looks at; `type(x)` and `x.__class__` are those of the sample.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.kept = kept_arguments(tree)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Call):
            self.kept[node.value] = (ALL,)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "type" and len(node.args) == 1:
            node.func = ast.copy_location(ast.Name("__type_of__", ast.Load()), node.func)
        if node in self.kept and name not in ("super", "locals", "globals"):
            keys = ast.Tuple([ast.Constant(key) for key in self.kept[node]], ast.Load())
            node.func = _called("__keeping_changes__", node.func, keys)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return _called("__type_of__", node.value)
        return node


def _called(name: str, argument: ast.expr, *more: ast.expr) -> ast.expr:
    call = ast.Call(ast.Name(name, ast.Load()), [argument, *more], [])
    return ast.fix_missing_locations(ast.copy_location(call, argument))


def _modules_used(tree: ast.Module) -> set[str]:
    """Names that a test uses as the standard library's modules, as in `math.isclose`, though it imports them not."""
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    bases = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return {name for name in bases - called if name in sys.stdlib_module_names or name in _ALIASES}
