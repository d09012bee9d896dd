"""Writes docs/map.md: every file of the project and the first sentence of what it says of itself. See `make map`."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "docs" / "map.md"
# Folder -> which of its files stand in the map. Of the tests, their folders tell enough: they mirror rlhf_ray/.
LISTED = {
    "rlhf_ray": ("*.py",), "configs": ("*.yaml", "*.py"), "examples": ("*.py",), "benchmarks": ("*.py", "*.md"),
    "docs": ("*.md", "*.py"), "docker": ("Dockerfile.*",), "requirements": ("*.txt",),
    "cluster": ("*.py", "*.yaml", "*.sh", "*.sbatch"),
}  # fmt: skip
# Of rlhf_ray, from the top down; tests/test_layers.py holds the imports to it.
ROOMS = {
    "cli, api": "the two faces: the command line, and `import rlhf_ray`",
    "commands": "one file a command, or a folder where it takes more",
    "start": "what a run starts from: its tokenizer, policy and rows, and whether it fits; `--dry-run`",
    "loops, scale": "RL, supervised training, evaluation on the way; `plan`: memory, time and layout before a run",
    "feedback": "pairs of answers, and who says which is better",
    "evaluation": "finished models compared",
    "rollout": "prompts become judged groups: order, choice, ledger, metrics",
    "remote, run": "the same roles on Ray; what a run writes down: directory, metrics, checkpoints, observers",
    "roles": "generator, reward, reference, critic, learner; their protocols, and who makes them",
    "rewards": "reward functions, judges, the sandbox, the reward server",
    "models, sync": "loading, engines, LoRA; weights on their way from the learner to the generators",
    "data": "files and datasets become prompts, answers and pairs",
    "config": "settings, and what they refuse",
    "algo, sample, clock, pulse": "formulas on tensors; one sequence as a policy wrote it; time; signs of life",
    "errors": "what goes wrong, and what to do",
}
HEADER = """# Map

Every file, and the first sentence of what it says of itself. `make map` writes this page;
`tests/test_map.py` holds it to the files. `tests/` has a folder for each of `rlhf_ray/`, and `system/`, where the real
commands run.

## The rooms

Of `rlhf_ray/`, from the top down. Each imports only from lines below its own.

| | |
| --- | --- |
"""


def entries() -> dict[str, str]:
    """Path -> its line, folder by folder, files before folders."""
    return {path.relative_to(ROOT).as_posix(): line_of(path) for path in _files()}


def line_of(path: Path) -> str:
    """The first sentence of a module's docstring, of a page, or of the comment at the top of any other file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        text = re.sub(r"^#[^\n]*\n", "", text.lstrip())
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link holds from where it stands
    else:
        comment = itertools.takewhile(lambda line: line.startswith("#"), text.split("\n"))
        text = "\n".join(line.lstrip("# ") for line in comment)
    # "et al. 2021" ends no sentence; a line that ends in a colon introduces a command.
    sentence = re.split(r"(?<=[.?!:])(?:[ ]*\n|\s+(?=[A-Z`])|$)", text.lstrip(), maxsplit=1)[0]
    return " ".join(sentence.split()).removesuffix(":")


def page() -> str:
    lines, folder = [], ""
    for name, line in entries().items():
        parent = name.rpartition("/")[0]
        if parent != folder:
            folder = parent
            lines += ["", f"## {folder}/", "", "| | |", "| --- | --- |"]
        lines.append(f"| [{name.rpartition('/')[2]}](../{name}) | {line.replace('|', chr(92) + '|')} |")
    rooms = "".join(f"| {names} | {what} |\n" for names, what in ROOMS.items())
    return HEADER + rooms + "\n".join(lines) + "\n"


def _files() -> Iterator[Path]:
    for top, patterns in LISTED.items():
        found = {path for pattern in patterns for path in (ROOT / top).rglob(pattern)}
        wanted = {path for path in found if path.name != "__init__.py" and path != MAP and path.stat().st_size}
        yield from sorted(wanted, key=lambda path: (path.parent.as_posix(), path.name))


if __name__ == "__main__":
    MAP.write_text(page(), encoding="utf-8")
    print(f"wrote {MAP}", file=sys.stderr)
