"""The files that `rlhf-ray init` writes beside the config: a reward function to begin with, and example rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_ray.commands.init.look import Command, Look, look
from rlhf_ray.data.rows import read_rows
from rlhf_ray.errors import ConfigError, StorageError

EXAMPLE_ROWS = 60
_ARGUMENTS = '''"""The reward of a run: what is good about an answer, as a number.

`{name}` gets a whole batch: lists of the same length, and each column of the data by its name. It returns a number for
each answer, the larger the better; None means that it has nothing to say of that one. More: docs/rewards.md.
The columns: {columns}.
"""


def {name}(prompts, completions, completion_ids, **columns):
'''
_WITH_ANSWER = '''    """1 where the completion is the row's {answer}, half of that where it is a part of it; else 0."""
    rewards = []
    for completion, right in zip(completions, columns[{answer!r}]):
        given, right = completion.strip().lower(), str(right).strip().lower()
        rewards.append(1.0 if given == right else 0.5 if right in given else 0.0)
    return rewards
'''
_WITHOUT = '''    """Up to 1 for whole sentences of about 12 words, without saying a word twice in a row."""
    rewards = []
    for completion in completions:
        words = completion.split()
        length = 1 - min(abs(len(words) - 12) / 12, 1)
        repeated = sum(a == b for a, b in zip(words, words[1:])) / max(len(words), 1)
        is_whole = completion.rstrip().endswith((".", "!", "?"))
        rewards.append(0.6 * length + 0.4 * is_whole - repeated)
    return rewards
'''


def reward_page(name: str, data: Look) -> str:
    """A Python file with a reward of that name, which works on these rows as it stands."""
    columns = ", ".join(data.columns) or "named as in the data"
    body = _WITH_ANSWER.format(answer=data.answer) if data.answer else _WITHOUT
    return _ARGUMENTS.format(name=name, columns=columns) + body


def example_rows(command: Command) -> list[dict[str, Any]]:
    """Rows of the kind that the command learns from, of those that come with the package."""
    if command in ("rm", "dpo"):
        return _first("dialogues.train")
    tasks = _first("tasks", 4 * EXAMPLE_ROWS)
    if command == "sft":
        return tasks[:EXAMPLE_ROWS]
    asked = [{"prompt": row["instruction"], "answer": row["output"]} for row in tasks if not row["input"]]
    return asked[:EXAMPLE_ROWS]


def look_at(rows: Iterable[Mapping[str, Any]], name: str, command: Command) -> Look:
    """What `look` would see in a file of that name with these rows, before it is written."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_text(as_lines(rows), encoding="utf-8")
        return replace(look(str(file), command, {}), source=name)


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_all(files: Mapping[Path, str], *, force: bool) -> None:
    """Writes all or nothing.

    Raises:
        ConfigError: a file is there already, says something else, and may not be replaced.
        StorageError: the disk does not take one.
    """
    there = [str(path) for path, text in files.items() if path.exists() and not _says(path, text)]
    if there and not force:
        raise ConfigError(f"{', '.join(there)}: already there; name another (--out), or replace it with --force")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            said = f"{path}: cannot be written ({error.strerror}); name another place with --out"
            raise StorageError(said) from error


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _first(name: str, count: int = EXAMPLE_ROWS) -> list[dict[str, Any]]:
    return [row.fields for row in islice(read_rows(f"shipped:{name}.jsonl"), count)]
