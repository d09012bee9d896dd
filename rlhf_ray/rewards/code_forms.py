"""The forms in which data sets write the tests of a program, read into one of three kinds of test."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Columns, or keys of the column `metadata`, in which data sets name the function that the tests are about.
NAME_COLUMNS = ("fn_name", "func_name", "entry_point")


@dataclass(frozen=True)
class ProgramTest:
    """A program is given `stdin` and must print `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class FunctionTest:
    """A function, or that method of a class `Solution`, must return one of `expected`.

    `readings`: (arguments, named arguments), the likeliest first; of these the first is used that the function's
    signature admits.
    """

    name: str
    readings: tuple[tuple[list, dict], ...]
    expected: tuple[Any, ...]


@dataclass(frozen=True)
class TextTest:
    """Python text that must come to its end without an exception."""

    code: str


Test = ProgramTest | FunctionTest | TextTest


def read_tests(given: Any, name: str = "") -> list[Test]:
    """All tests of a row. `name`: of the function that they are about, where the data names it in another column.

    Raises:
        ValueError: there is none, or one that cannot be read or could not fail.
    """
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # Python text may begin with a bracket too
            given = json.loads(given)
    if isinstance(given, Mapping) and "inputs" in given and "outputs" in given:
        tests: list[Test] = list(_listed(given, name))
    else:
        entries = [given] if isinstance(given, (str, Mapping)) else list(given or ())
        tests = [_read_one(entry, name) for entry in entries]
    tests = with_their_beginnings(tests, name)
    if not tests:
        raise ValueError("there are none")
    return tests


def _listed(given: Mapping, name: str) -> Iterator[Test]:
    """`{"inputs": [...], "outputs": [...]}` of APPS, TACO and verl; with `fn_name` for calls."""
    inputs, outputs = (_json_list(given[key], key) for key in ("inputs", "outputs"))
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
    name = str(given.get("fn_name") or given.get("func_name") or "")
    for read, right in zip(inputs, outputs, strict=True):
        yield _call(name, read, right) if name else ProgramTest(_as_text(read), _as_text(right))


def _read_one(given: Any, name: str) -> Test:
    if isinstance(given, str) and given.strip():
        return TextTest(given)
    if isinstance(given, Mapping) and {"input", "output"} <= set(given):
        own = str(given.get("fn_name") or given.get("func_name") or "")
        if own or given.get("testtype") == "functional":
            if not (own or name):
                raise ValueError("testtype is functional, but nothing names the function: give each test a fn_name, "
                                 f"or the row a column {' or '.join(NAME_COLUMNS)}")  # fmt: skip
            return _call(own or name, given["input"], given["output"])
        return ProgramTest(_as_text(given["input"]), _as_text(given["output"]))
    raise ValueError(f"{str(given)[:80]!r} is neither Python text nor an input with its output")


def _call(name: str, given: Any, right: Any) -> FunctionTest:
    """APPS gives a list of arguments, LiveCodeBench one JSON value a line."""
    if isinstance(given, str):
        right = _literal(right) if isinstance(right, str) else right
        lines = [line for line in given.split("\n") if line.strip()]
        try:
            args = [json.loads(line) for line in lines]
        except ValueError:
            args = [_literal(given)]  # one value on several lines
        readings: list[tuple[list, dict]] = [(args, {})]
        if len(args) == 1 and isinstance(args[0], list):
            readings.append((args[0], {}))
    elif isinstance(given, Sequence):
        readings = [([_with_number_keys(arg) for arg in given], {})]
    elif isinstance(given, Mapping):
        readings = [([], dict(given)), ([dict(given)], {})]
    else:
        readings = [([given], {})]
    # APPS puts some outputs into a list of one.
    expected = (right, right[0]) if isinstance(right, list) and len(right) == 1 else (right,)
    return FunctionTest(name, tuple(readings), expected)


def _literal(text: str) -> Any:
    """JSON, or what Python would print: `True`, `['a', None]`. A text that is neither is itself."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(text.strip())
        json.dumps(value)  # a set or bytes are no JSON
        return value
    return text


def _with_number_keys(arg: Any) -> Any:
    """JSON's keys are texts; as APPS's own checker does, numbers become numbers again."""
    if isinstance(arg, Mapping) and arg and all(isinstance(key, str) and key.lstrip("-").isdecimal() for key in arg):
        return {int(key): value for key, value in arg.items()}
    return arg


def _json_list(given: Any, key: str) -> list:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{key} is no JSON ({error})") from None
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{key} is a {type(given).__name__}, not a list with an entry for each test")
    return list(given)


def _as_text(given: Any) -> str:
    """Some data sets give the lines as a list."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return "\n".join(map(str, given))
    return str(given)


# ---- Python text ------------------------------------------------------------------------------------------------


def with_their_beginnings(tests: Sequence[Test], name: str = "") -> list[Test]:
    """Texts that use nothing of a sample (imports, helpers) are no tests: they become the beginning of the next one.

    Raises:
        ValueError: a text is no Python, or what it defines is never called, or nothing in it uses a sample.
    """
    made: list[Test] = []
    beginning, known = "", set[str]()
    for test in tests:
        if not isinstance(test, TextTest):
            made.append(test)
            continue
        code = _with_its_call(test.code, name)
        _refuse_what_is_not_shared(code)
        if free_names(code) - known and not _only_defines(code):
            made.append(TextTest(beginning + code))
            beginning = ""
        else:
            beginning += code + "\n"
        known |= bound_names(code)
    if beginning:
        last = next((i for i in reversed(range(len(made))) if isinstance(made[i], TextTest)), None)
        if last is None:
            raise ValueError("the text of the tests never uses anything that a sample could define")
        made[last] = replace(made[last], code=f"{made[last].code}\n{beginning}")
    return made


# What a test may replace: the sample's process asks for these. Anything else it would replace in its own alone.
_REPLACEABLE = {"builtins.input", "sys.stdin", "sys.stdout"}


def _refuse_what_is_not_shared(code: str) -> None:
    """Tests run in another process than the sample: what they do to their own does not reach it."""
    free = {node.id for node in ast.walk(_parsed(code)) if isinstance(node, ast.Name)} - bound_names(code)
    if "open" in free or "tempfile" in _imported(_parsed(code)):
        raise ValueError("they use files, and the sample's process has a folder of its own")
    for node in ast.walk(_parsed(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "patch":
            target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if target not in _REPLACEABLE:
                raise ValueError(f"they replace {target or 'something'}, but not in the sample's process")


def _only_defines(code: str) -> bool:
    """Functions for a later text to call; but for those that pytest and unittest would run."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Import, ast.ImportFrom)
    body = _parsed(code).body
    return all(isinstance(node, kinds) for node in body) and not any(
        getattr(node, "name", "").startswith("test") for node in body
    )


def _with_its_call(code: str, name: str) -> str:
    """HumanEval's tests define `check(candidate)` and leave the call to their harness."""
    tree = _parsed(code)
    defines = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    if not defines or any(isinstance(node, ast.Name) and node.id == "check" for node in ast.walk(tree)):
        return code
    if not name:
        raise ValueError("they define check(candidate) and never call it: add the call, or a column entry_point")
    return f"{code}\ncheck({name})\n"


def free_names(code: str) -> set[str]:
    """Names that a text uses and does not bind itself, but for Python's own; a builtin's name is free only where it
    is the one thing that the text could be a test of.
    """
    tree = _parsed(code)
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = loaded - bound_names(code) - {"__name__", "__file__"}
    known = {name for name in free if hasattr(builtins, name)}
    if "solution" in _imported(tree):
        free.add("solution")
    if free & {"globals", "eval", "exec", "locals", "vars"}:
        return free
    return free - known or (known if builtin_under_test(code) else set())


def builtin_under_test(code: str) -> str:
    """A function may have the name of a builtin one (MBPP's `sum`). It is meant only where a text names nothing else
    that is not its own: otherwise a sample could define what its tests call `all`.
    """
    tree = _parsed(code)
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = loaded - bound_names(code)
    if len(free) != 1 or not hasattr(builtins, name := next(iter(free))):
        return ""
    found = getattr(builtins, name)
    return "" if isinstance(found, type) and issubclass(found, BaseException) else name


def _imported(tree: ast.Module) -> set[str]:
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return modules | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}


def bound_names(code: str) -> set[str]:
    bound: set[str] = set()
    for node in ast.walk(_parsed(code)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias) and node.name != "*":
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound


def about_texts(codes: Sequence[str]) -> dict[str, Any]:
    """What the process that runs the texts has to know, beside them: `mentioned` and `free` names, `outside`: classes
    that the texts define, and `builtin_under_test`.
    """
    code = "\n".join(codes)
    tree = _parsed(code)
    mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    mentioned |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {"mentioned": sorted(mentioned), "free": sorted(mentioned - bound_names(code)),
            "outside": [node.name for node in tree.body if isinstance(node, ast.ClassDef) and _holds_no_data(node)],
            "builtin_under_test": builtin_under_test(code)}  # fmt: skip


def _holds_no_data(node: ast.ClassDef) -> bool:
    """Of a list's or a tree's nodes, which a sample may make too; not of tests, whose fields are expected values."""
    kinds = (ast.FunctionDef, ast.AnnAssign, ast.Pass)
    tested = any(getattr(part, "name", "").startswith(("test", "check")) for part in node.body)
    texts = [part for part in node.body if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)]
    return not tested and not node.name.startswith("Test") and all(
        isinstance(part, kinds) or part in texts for part in node.body
    )


@functools.lru_cache(maxsize=64)
def _parsed(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"no Python: {error}") from None
