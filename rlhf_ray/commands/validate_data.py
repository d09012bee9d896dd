"""`rlhf-ray validate-data`: what a dataset holds, and what is wrong with it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer


def validate_data(
    path: Annotated[str, typer.Argument(help="a file, a folder or a Hugging Face dataset name")],
    kind: Annotated[str, typer.Option("--type", help="prompt, preference, messages, ...; auto: by columns")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="a column with a name of its own: prompt=question")] = None,
    split: Annotated[str, typer.Option(help="of a folder or a Hugging Face dataset")] = "train",
    model: Annotated[str | None, typer.Option(help="tokenize the rows too, with this model's tokenizer")] = None,
    template: Annotated[str, typer.Option(help="with --model: auto, chat, alpaca or none")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="with --model: a .jinja file, or zephyr")] = None,
    max_length: Annotated[int | None, typer.Option(help="with --model: rows with more tokens are bad")] = None,
    command: Annotated[
        str | None, typer.Option("--for", help="sft, rm, dpo, kto, classifier or rl; empty: what the rows suit")
    ] = None,
    show: Annotated[int | None, typer.Option(help="with --model: line of the row to show; empty: a good one")] = None,
    near_duplicates: Annotated[
        float | None, typer.Option(help="count rows that are so much alike an earlier one, e.g. 0.8")
    ] = None,
    against: Annotated[list[str] | None, typer.Option(help="a test file: count prompts that it asks too")] = None,
    privacy: Annotated[bool, typer.Option("--privacy", help="count mail addresses, telephone numbers, ...")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check a dataset: file and line of every bad row, and what the good ones are. Exit status 1 if any is bad."""
    from rlhf_ray.config.data import DatasetConfig
    from rlhf_ray.config.load import parse_config
    from rlhf_ray.data.quality import QualityWishes
    from rlhf_ray.data.validate import columns_from, command_from, validate

    given = {"path": path, "type": kind, "split": split, "template": template, "chat_template": chat_template}
    data = parse_config({**given, "columns": columns_from(column or [])}, DatasetConfig, source="validate-data")
    tokenizer = None
    if model is not None:
        from rlhf_ray.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
    wishes = QualityWishes(near_duplicates, tuple(against or ()), privacy)
    told = command_from(command)
    report = validate(data, tokenizer, max_length=max_length, command=told, show=show, wishes=wishes)
    print(report.json() if as_json else report.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    raise typer.Exit(0 if report.is_good else 1)
