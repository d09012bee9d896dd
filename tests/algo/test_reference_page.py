"""The reference page names every public function, and the room stays small."""

from __future__ import annotations

import ast

import pytest


@pytest.fixture(scope="module")
def modules(repo_root):
    return {path.name: ast.parse(path.read_text()) for path in sorted((repo_root / "rlhf_ray/algo").glob("*.py"))}


def test_every_public_name_is_on_the_page(repo_root, modules):
    page = (repo_root / "docs" / "algorithms.md").read_text()
    internal = {"group_index", "centre_and_size", "group_std", "log_ratio"}
    missing = [
        f"{file}: {node.name}"
        for file, module in modules.items()
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if node.name not in internal and f"`{node.name}" not in page and f".{node.name}`" not in page
    ]
    assert not missing, missing


def test_every_file_the_page_names_exists(repo_root):
    page = (repo_root / "docs" / "algorithms.md").read_text()
    words = page.replace("`", " ").replace(",", " ").replace(":", " ").split()
    for name in {word for word in words if word.startswith("test_") and word.endswith(".py")}:
        assert (repo_root / "tests" / "algo" / name).exists(), name
    for name in {word for word in words if "/test_" in word and word.endswith(".py")}:
        assert (repo_root / "tests" / name).exists() or (repo_root / name).exists(), name


def test_sizes(repo_root, modules):
    lines = sum(len(p.read_text().splitlines()) for p in (repo_root / "rlhf_ray/algo").glob("*.py"))
    assert lines < 1200
    for file, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 40, f"{file}: {node.name}"
