"""`rlhf-ray eval`: models compared on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, RunDir, print_dry_run
from rlhf_ray.models.library_logs import quiet_libraries


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    ratings: Annotated[
        list[Path] | None,
        typer.Option(help="a filled rating sheet: add it to the finished evaluation in --run-dir; repeatable"),
    ] = None,
) -> None:
    """Compare models on the same prompts: rewards, perplexity, diversity, pass@k, win rate, red team, ratings."""
    from rlhf_ray.config.evaluation import EvalRunConfig
    from rlhf_ray.config.load import load_config

    settings = load_config(config, overrides or [], EvalRunConfig)
    if dry_run:
        print_dry_run(settings)
        return
    quiet_libraries(settings.device)
    from rlhf_ray.evaluation.command import add_ratings, run_eval
    from rlhf_ray.evaluation.table import print_evaluation

    # The resolved config lies in the run directory of its evaluation.
    result = add_ratings(run_dir or config.parent, ratings) if ratings else run_eval(settings, run_dir, note=print)
    print_evaluation(result)
    print(f"Everything is in {result['run_dir']}")
