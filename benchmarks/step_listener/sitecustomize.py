"""Listens inside the processes of a run, for `benchmarks/files_of_a_step.py`: when a function of which file began.

Python imports a module of this name when it starts, so with this folder on PYTHONPATH every process of a run listens,
Ray's workers too, in all their threads, and the product knows nothing of it. Each function of `rlhf_ray` is compiled
with one more statement, which notes the file and the millisecond (CLOCK_MONOTONIC: the same for all processes). Each
process writes a file of its own to $STEP_FILES_OUT: `{"loops/rl.py": [milliseconds], ...}`.
"""

from __future__ import annotations

import ast
import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

OUT = os.environ.get("STEP_FILES_OUT")
EVERY = 0.5  # seconds: a worker may be killed at the end of its run
began: dict[str, set[int]] = defaultdict(set)


def note(file: str) -> None:
    began[file].add(time.monotonic_ns() // 1_000_000)


class WithNotes(ast.NodeTransformer):
    """Every function notes, before anything else, that it runs."""

    def __init__(self, file: str) -> None:
        self.note = ast.parse(f"__import__('sys').modules['sitecustomize'].note({file!r})").body[0]

    def visit_FunctionDef(self, node: Any) -> Any:
        self.generic_visit(node)
        behind_docstring = 1 if ast.get_docstring(node) is not None else 0
        node.body.insert(behind_docstring, ast.copy_location(self.note, node.body[0]))
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        source = self.get_data(self.path)  # and not from a .pyc, in which nothing is noted
        file = self.path.rpartition("/rlhf_ray/")[2]
        return compile(ast.fix_missing_locations(WithNotes(file).visit(ast.parse(source))), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "rlhf_ray":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def write() -> None:
    if began:
        found = {file: sorted(times) for file, times in list(began.items())}
        unfinished = Path(OUT) / f"{os.getpid()}.unfinished"
        unfinished.write_text(json.dumps(found))
        unfinished.replace(unfinished.with_suffix(".json"))


def keep_writing() -> None:
    def forever() -> None:
        while True:
            time.sleep(EVERY)
            write()

    threading.Thread(target=forever, daemon=True).start()


if OUT:
    sys.meta_path.insert(0, Finder())
    atexit.register(write)
    keep_writing()
    os.register_at_fork(after_in_child=lambda: (began.clear(), keep_writing()))
