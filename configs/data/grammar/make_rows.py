"""Writes the rows beside this folder from their grammars: always the same ones. See `make rows`.

    python configs/data/grammar/make_rows.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import dialogues
import problems
import reviews
import tasks


def write(folder: Path) -> None:
    files = {
        **reviews.splits(train=1400, test=400),
        **dialogues.splits(train=340, test=80),
        **problems.splits(train=360, test=90),
        **tasks.splits(320),
    }
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
