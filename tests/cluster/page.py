"""The commands of docs/cluster.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"


def lines_of(heading: str) -> list[tuple[str, list[str]]]:
    """(the comment above, the words) of each command in the first block under this heading."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    block = re.search(r"```bash\n(.*?)```", section[1], re.DOTALL)[1]
    lines, comment = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            comment = line.removeprefix("#").strip()
        elif line.strip():
            lines.append((comment, shlex.split(line, comments=True)))
    return lines
