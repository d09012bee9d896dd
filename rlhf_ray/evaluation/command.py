"""`rlhf-ray eval`: the comparison, in a run directory and on the screen."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.load import dump_config, validated
from rlhf_ray.errors import DataError
from rlhf_ray.evaluation.answers import Answers
from rlhf_ray.evaluation.compare import Comparison, Note, compare
from rlhf_ray.evaluation.ratings import export_ratings, import_ratings
from rlhf_ray.run.directory import RunDirectory, ended_by
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.storage import append_line, to_json, write_atomically

RESULT, KEY = "eval.json", "ratings_key.json"


def run_eval(
    config: EvalRunConfig, run_dir: str | Path | None = None, note: Note = lambda line: None
) -> dict[str, Any]:
    """Compares the models; returns what eval.json holds, with `run_dir`.

    Writes config.yaml, eval.json, answers/<model>.jsonl, events.jsonl (alarms), summary.json and, if asked for, the
    rating sheet with its key. Raises RlhfRayError.
    """
    config = validated(config)
    directory = RunDirectory.open(config.name, run_dir)
    config = frozen_clock(config, directory)
    directory.write_config(dump_config(config))
    started = time.monotonic()
    summary: dict[str, Any] = {"name": config.name, "run_dir": str(directory.path), "steps": 0}
    try:
        comparison = compare(config, note)
    except BaseException as error:
        directory.write_summary({**summary, **ended_by(error)})
        raise
    for alarm in comparison.result["alarms"]:
        directory.event("alarm", kind="perplexity", reason=alarm)
    for name, answers in comparison.answers.items():
        _write_answers(directory.path / "answers" / f"{name}.jsonl", comparison.prompts, answers)
    if config.ratings is not None:
        _write_sheet(config, directory.path, comparison)
    write_atomically(directory.path / RESULT, to_json(comparison.result, indent=1))
    models = {name: model["metrics"] for name, model in comparison.result["models"].items()}
    seconds = round(time.monotonic() - started, 3)
    directory.write_summary({**summary, "status": "finished", "seconds": seconds, "models": models})
    return {**comparison.result, "run_dir": str(directory.path)}


def add_ratings(run_dir: Path, sheets: Sequence[Path]) -> dict[str, Any]:
    """Reads filled rating sheets into the evaluation in `run_dir`; returns eval.json, now with `ratings`.

    Raises DataError: no evaluation there, or a sheet that cannot be read.
    """
    path = run_dir / RESULT
    if not path.is_file():
        raise DataError(f"{run_dir}: holds no {RESULT}; set --run-dir to the run directory of the evaluation")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["ratings"] = import_ratings(sheets, run_dir / KEY)
    write_atomically(path, to_json(result, indent=1))
    return {**result, "run_dir": str(run_dir)}


def _write_answers(path: Path, prompts: Sequence[str], answers: Answers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for row, completion in enumerate(answers.completions):
        fields = {
            "prompt_id": row // answers.samples,
            "prompt": prompts[row // answers.samples],
            "completion": completion,
            "tokens": int(answers.rows.response_lengths[row]),
            "truncated": bool(answers.rows.truncated[row]),
        }
        if answers.scores.by_function:
            fields |= {"reward": float(answers.scores.score[row]), "rewards": answers.scores.of_row(row)}
        append_line(path, fields)


def _write_sheet(config: EvalRunConfig, folder: Path, comparison: Comparison) -> None:
    count = min(config.ratings.prompts, len(comparison.prompts))
    first = {
        name: [answers.completions[i * answers.samples] for i in range(count)]
        for name, answers in comparison.answers.items()
    }
    sheet = folder / f"ratings.{config.ratings.format}"
    export_ratings(sheet, folder / KEY, comparison.prompts[:count], first, config.seed)
