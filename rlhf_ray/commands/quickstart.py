"""`rlhf-ray quickstart`: a first run that needs nothing but this package."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_ray.commands import rl
from rlhf_ray.commands.options import DryRun, Overrides, Resume, ResumeMode, RunDir
from rlhf_ray.commands.pipeline import command as pipeline
from rlhf_ray.config.shipped import shipped_config


def quickstart(
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
    preferences: Annotated[
        bool,
        typer.Option("--preferences", help="the other ending: movie reviews, from preferences (values.train=<file>)"),
    ] = False,
) -> None:
    """A small transformer learns to add, from nothing, in a few minutes on a laptop. Needs no network and no GPU."""
    if preferences:
        pipeline.run(shipped_config("pipeline_reviews.yaml"), overrides or [], run_dir, resume, dry_run)
    else:
        rl.run(shipped_config("grpo_arithmetic.yaml"), overrides or [], run_dir, resume, dry_run)
