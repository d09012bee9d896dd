"""The shape of the house: who may import whom, how large things may grow, what an import may cost.

Imports inside functions count too: a lazy import changes when a module is loaded, not who knows whom.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlhf_ray"

# From the top down. A room may import from the lines below its own, and from itself; rooms on one line do not know each
# other. So what a run writes down (run/) is for those above it: a role or a worker returns numbers and knows no files.
LINES = (
    ("__init__",),
    ("cli", "api"),
    ("commands",),
    ("start",),
    ("loops", "scale"),
    ("feedback",),
    ("evaluation",),
    ("rollout",),
    ("remote", "run"),
    ("roles",),
    ("rewards",),
    ("models", "sync"),
    ("data",),
    ("config",),
    ("algo", "sample", "clock", "pulse"),
    ("errors",),
)
LEVEL = {room: -number for number, line in enumerate(LINES) for room in line}

# Heavy libraries and the only places that may name them.
OWNERS = {
    "ray": ("rlhf_ray/remote/", "rlhf_ray/scale/", "cluster/"),
    "deepspeed": ("rlhf_ray/models/deepspeed_library.py",),
    "vllm": ("rlhf_ray/roles/vllm_engine.py", "rlhf_ray/sync/vllm_transfer.py"),
}

NAMELESS = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}


def source_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "cluster").rglob("*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: str) -> str:
    """rlhf_ray.models.lora -> models; rlhf_ray -> '' """
    return (module.split(".") + [""])[1]


def absolute_base(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = list(path.relative_to(ROOT).with_suffix("").parts[: -node.level])
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in the file, wherever it stands."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(path, node)
            if base == "rlhf_ray":  # `from rlhf_ray import roles` names the module only after the import
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return found


def may_import(importer: str, imported: str) -> bool:
    if imported in ("", importer):
        return True
    return LEVEL[importer] > LEVEL[imported]


def test_rule_itself():
    assert may_import("cli", "algo") and may_import("roles", "sync") and may_import("loops", "run")
    assert not may_import("sync", "roles")
    assert not may_import("models", "sync"), "rooms on one line do not know each other"
    assert not may_import("roles", "run") and not may_import("run", "loops") and not may_import("remote", "run")


def test_imports_inside_functions_and_relative_ones_are_seen(tmp_path, monkeypatch):
    module = tmp_path / "rlhf_ray" / "roles" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text("def f():\n    from ..loops import rl\n    import importlib\n"
                      "    importlib.import_module('ray.util')\n    from rlhf_ray import start\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert sorted(imports_of(module)) == [
        (2, "rlhf_ray.loops"), (3, "importlib"), (4, "ray.util"), (5, "rlhf_ray.start")]  # fmt: skip


def test_every_room_has_a_level():
    rooms = {room_of(name_of(p).removesuffix(".py").replace("/", ".")) for p in PACKAGE.rglob("*.py")}
    unknown = rooms - set(LEVEL) - {""}
    assert not unknown, f"{sorted(unknown)}: say in tests/test_layers.py (LINES) where these stand"


def test_imports_point_down():
    wrong = []
    for path in source_files():
        importer = room_of(name_of(path).removesuffix(".py").replace("/", "."))
        for line, module in imports_of(path):
            root = module.split(".")[0]
            if name_of(path).startswith("rlhf_ray/") and root == "cluster":
                wrong.append(f"{name_of(path)}:{line} the package never imports cluster/")
            if root == "rlhf_ray" and name_of(path).startswith("rlhf_ray/"):
                imported = room_of(module)
                if imported in LEVEL:
                    if not may_import(importer, imported):
                        wrong.append(f"{name_of(path)}:{line} {importer} may not import {module}")
                elif imported:
                    wrong.append(f"{name_of(path)}:{line} {module}: no such room")
    assert not wrong, "\n".join(wrong)


def test_files_import_each_other_in_no_circle():
    """Inside a room, too: who reads a file need not have read the ones that use it."""
    files = {name_of(path).removesuffix(".py").replace("/", "."): path for path in PACKAGE.rglob("*.py")}
    imported = {name: {module for _, module in imports_of(path)} & files.keys() for name, path in files.items()}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_heavy_libraries_are_named_only_by_their_owners():
    wrong = []
    for path in source_files():
        for line, module in imports_of(path):
            owners = OWNERS.get(module.split(".")[0])
            if owners and not name_of(path).startswith(owners):
                wrong.append(f"{name_of(path)}:{line} imports {module}; only {', '.join(owners)} may")
    assert not wrong, "\n".join(wrong)


def test_algo_sees_torch_and_the_standard_library_only():
    allowed = set(sys.stdlib_module_names) | {"torch"}
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in sorted((PACKAGE / "algo").rglob("*.py"))
        for line, module in imports_of(path)
        if module.split(".")[0] not in allowed and not f"{module}.".startswith("rlhf_ray.algo.")
    ]
    assert not wrong, "\n".join(wrong)


def test_init_files_are_empty():
    """But for the package's own, which is the Python door."""
    inner = [p for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE]
    assert [name_of(p) for p in inner if p.read_text().strip()] == []


def test_every_folder_with_code_is_a_package():
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    assert [name_of(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_no_room_without_a_name_of_its_own():
    assert [name_of(p) for p in source_files() if p.name in NAMELESS] == []


def test_sizes():
    wrong = []
    for path in source_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = 149 if name_of(path) == "rlhf_ray/loops/rl.py" else 400
        if lines > limit:
            wrong.append(f"{name_of(path)}: {lines} lines, at most {limit}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    wrong.append(f"{name_of(path)}:{node.lineno} {node.name}: {length} lines, at most 60")
    assert not wrong, "\n".join(wrong)


# ---- what an import costs, in a process of its own --------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_in(*parts: str) -> list[str]:
    return [
        name_of(p).removesuffix(".py").replace("/", ".")
        for p in sorted((PACKAGE.joinpath(*parts)).rglob("*.py"))
        if p.name != "__init__.py"
    ]


@pytest.mark.slow
def test_algo_loads_nothing_heavier_than_torch():
    loaded = run_python(
        "import sys, importlib\n"
        f"for name in {modules_in('algo')!r}: importlib.import_module(name)\n"
        "heavy = {'transformers', 'datasets', 'pydantic', 'ray', 'vllm', 'deepspeed', 'peft', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert loaded == "[]"


@pytest.mark.slow
def test_local_mode_imports_neither_ray_nor_vllm_nor_deepspeed():
    owned = tuple(o for owners in OWNERS.values() for o in owners if o.endswith(".py"))
    rooms = {*LEVEL} - {"remote", "scale"}
    names = [
        module
        for module in modules_in()
        if room_of(module) in rooms and module.replace(".", "/") + ".py" not in owned
    ]
    loaded = run_python(
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'ray', 'vllm', 'deepspeed'} & set(sys.modules)))"
    )
    assert loaded == "[]"
