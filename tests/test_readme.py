"""What the README names exists (the map of all files: test_map.py), and every module says what it is."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_says_what_it_is():
    listed = ["git", "ls-files", "rlhf_ray", "examples", "benchmarks"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        path = ROOT / name
        if path.suffix == ".py" and path.is_file() and path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_make_targets_files_and_functions_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:rlhf_ray|configs|benchmarks|docs|examples|requirements)/[\w/.-]+)`", README):
        assert (ROOT / name).exists(), name
    for function, name in re.findall(r"`(?:\w+\.)?(\w+)` in `([\w/.]+\.py)`", README):
        assert f"def {function}(" in (ROOT / name).read_text(encoding="utf-8"), (function, name)


def test_every_link_leads_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{page.name}: {link}"


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) < 130, "what is more belongs into docs/"
