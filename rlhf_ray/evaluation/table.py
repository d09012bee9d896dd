"""An evaluation on a terminal: models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ray.evaluation.ratings import ASPECTS

SAMPLES_SHOWN = 5


def print_evaluation(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The table of metrics, win rates and ratings; alarms; the same prompts side by side."""
    console = console or Console()
    names = list(result["models"])
    title = f"{result['prompts']} prompts, {result['samples_per_prompt']} answers each; baseline: {result['baseline']}"
    table = Table(title=title)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, cells in rows_of(result):
        table.add_row(Text(label), *cells)
    console.print(table)
    for alarm in result["alarms"]:
        console.print(Text(f"ALARM {alarm}", style="bold red"))
    if result["samples"]:
        samples = Table("prompt", *names, title="The same prompts side by side")
        for sample in result["samples"][:SAMPLES_SHOWN]:
            # Text: an answer may hold [brackets], which rich would take for markup.
            samples.add_row(Text(sample["prompt"]), *(Text(_shown(sample["answers"][name])) for name in names))
        console.print(samples)


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, one cell a model) of everything that was measured."""
    names = list(result["models"])
    metrics = [result["models"][name]["metrics"] for name in names]
    labels = dict.fromkeys(label for each in metrics for label in each)
    rows = [(label, [_number(each.get(label)) for each in metrics]) for label in labels]
    rates = result["win_rate"]
    if rates:
        rows.append((f"win rate by {next(iter(rates.values()))['by']}", [_rate(rates.get(name)) for name in names]))
    for aspect in ASPECTS if "ratings" in result else ():
        given: Sequence[Any] = [result["ratings"].get(name, {}).get(aspect) for name in names]
        rows.append((f"{aspect} (people, 1-10)", [_number(value) for value in given]))
    return rows


def _number(value: Any) -> str:
    return "" if value is None else f"{float(value):.3f}"


def _rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return ""
    if rate["rate"] is None:
        return f"undecided ({rate['ties']} ties)"
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def _shown(answer: Mapping[str, Any]) -> str:
    reward = answer["reward"]
    return answer["completion"] if reward is None else f"{answer['completion']}  [{float(reward):.2f}]"
