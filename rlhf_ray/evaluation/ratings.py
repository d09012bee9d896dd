"""3H ratings by people: a blind, shuffled sheet to fill in, and what the filled sheets say.

The sheet shows a prompt, an answer and three empty columns: helpful, harmless, honest, each 1 to 10 (the three aims
of Askell et al., 2021). Which model wrote which answer stands in a key that raters do not get.
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.data.rows import Row, read_rows
from rlhf_ray.errors import DataError
from rlhf_ray.run.storage import explained, to_json, write_atomically

ASPECTS = ("helpful", "harmless", "honest")
LOWEST, HIGHEST = 1, 10
_COLUMNS = ("id", "prompt", "answer", *ASPECTS)


def export_ratings(
    sheet: Path, key: Path, prompts: Sequence[str], answers: Mapping[str, Sequence[str]], seed: int
) -> None:
    """Write the sheet (.csv or .jsonl) and its key. `answers` holds each model's answer to each prompt.

    Rows are shuffled as a whole, so neither the order nor the id tells which model wrote an answer.
    """
    rows = [(name, i, text) for name, texts in answers.items() for i, text in enumerate(texts)]
    random.Random(seed).shuffle(rows)
    shown = [
        {"id": f"r{number:04d}", "prompt": prompts[i], "answer": text, **dict.fromkeys(ASPECTS, "")}
        for number, (_, i, text) in enumerate(rows, start=1)
    ]
    with explained(sheet.name, sheet):
        if sheet.suffix == ".csv":
            with sheet.open("w", encoding="utf-8-sig", newline="") as file:  # the mark makes Excel read UTF-8
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows({name: _not_a_formula(value) for name, value in row.items()} for row in shown)
        else:
            sheet.write_text("".join(to_json(row) + "\n" for row in shown), encoding="utf-8")
    identity = {row["id"]: {"model": name, "prompt": i} for row, (name, i, _) in zip(shown, rows, strict=True)}
    write_atomically(key, to_json(identity, indent=1))


def import_ratings(sheets: Sequence[Path], key: Path) -> dict[str, dict[str, Any]]:
    """{model: {helpful, harmless, honest (means), <aspect>_std, answers, ratings}} of all filled sheets, one a rater.

    Rows without any number are taken as not rated. Raises DataError, which names file and line, for an id that the
    key does not know, one that comes twice in a sheet, a number out of 1..10 or no number, and half-filled rows.
    """
    try:
        identity = json.loads(key.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{key}: the key of the rating sheet cannot be read ({error}); it lies in the run directory of the "
            "evaluation that wrote the sheet: set --run-dir to it"
        ) from error
    given: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    rated: dict[str, set[int]] = defaultdict(set)
    for sheet in sheets:
        seen: set[str] = set()
        for row in read_rows(str(sheet)):
            name = _known(row, identity, seen)
            numbers = _numbers(row)
            if numbers is not None:
                rated[name["model"]].add(name["prompt"])
                for aspect, number in zip(ASPECTS, numbers, strict=True):
                    given[name["model"]][aspect].append(number)
    if not given:
        raise DataError(f"{', '.join(map(str, sheets))}: no row is rated; fill in {', '.join(ASPECTS)} with 1 to 10")
    return {name: _summary(aspects, len(rated[name])) for name, aspects in given.items()}


def _not_a_formula(value: str) -> str:
    """A spreadsheet would run an answer that begins like a formula; those of East Asia read full-width signs too."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")) else value


def _known(row: Row, identity: Mapping[str, Any], seen: set[str]) -> Mapping[str, Any]:
    number = str(row.fields.get("id", "")).strip()
    if number not in identity:
        raise DataError(f"{row.where}: id {number!r} is not in the key; is this the sheet of another evaluation?")
    if number in seen:
        raise DataError(f"{row.where}: id {number} comes twice in this sheet; keep one of the rows")
    seen.add(number)
    return identity[number]


def _numbers(row: Row) -> list[int] | None:
    texts = {aspect: str(row.fields.get(aspect, "") or "").strip() for aspect in ASPECTS}
    if not any(texts.values()):
        return None
    missing = [aspect for aspect, text in texts.items() if not text]
    if missing:
        raise DataError(f"{row.where}: {', '.join(missing)} is empty; rate all three, or none of them")
    return [_rating(row, aspect, text) for aspect, text in texts.items()]


def _rating(row: Row, aspect: str, text: str) -> int:
    number = float(text) if text.replace(".", "", 1).isdecimal() else None  # spreadsheets write 7 as 7.0
    if number is None or number != int(number) or not LOWEST <= number <= HIGHEST:
        raise DataError(f"{row.where}: {aspect}={text!r}; give a whole number from {LOWEST} to {HIGHEST}")
    return int(number)


def _summary(aspects: Mapping[str, Sequence[int]], answers: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for aspect in ASPECTS:
        numbers = aspects[aspect]
        mean = sum(numbers) / len(numbers)
        result[aspect] = mean
        result[f"{aspect}_std"] = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
    return {**result, "answers": answers, "ratings": len(aspects[ASPECTS[0]])}
