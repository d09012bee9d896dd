"""The table at the end of a run: before and after, and the same prompts answered before and after."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

PROMPT_SHOWN = 300  # characters


def print_summary(summary: dict[str, Any], *, writes: bool) -> None:
    """`summary`: what summary.json of a training run holds; `writes`: its model answers prompts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlhf_ray.run.progress import on_one_line

    console = Console()
    table = Table(title=f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name in {**summary["before"], **summary["after"]}:
        # Some are not always there: a function's mean is, only where it judged an answer.
        values = [summary[when].get(name) for when in ("before", "after")]
        if all(value is None or isinstance(value, (int, float)) for value in values):
            table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    samples = Table("prompt", "before", "after", title="The same held-out prompts before and after")
    for old, new in zip(*(summary[when].get("samples", []) for when in ("before", "after")), strict=True):
        # Text: a completion may hold [brackets], which rich would take for markup.
        shown = [_sample_text(sample) for sample in (old, new)]
        # The end of a long prompt is what is answered; summary.json has all of it.
        asked = old["prompt"] if len(old["prompt"]) <= PROMPT_SHOWN else "…" + old["prompt"][-PROMPT_SHOWN:]
        samples.add_row(*(Text(on_one_line(text)) for text in (asked, *shown)))
    if samples.row_count:
        console.print(samples)
    # print: rich would break a long path in two
    folder = Path(summary["run_dir"])
    adapter = f", its LoRA adapter alone in {folder / 'adapter'}" if (folder / "adapter").is_dir() else ""
    print(f"Everything is in {folder}; the model is in {folder / 'model'}{adapter}")
    if writes:
        print(f"Talk to it: rlhf-ray generate {shlex.quote(str(folder))}")


def _sample_text(sample: dict[str, Any]) -> str:
    return sample["completion"] + (f"  [{float(sample['reward']):.2f}]" if "reward" in sample else "")
