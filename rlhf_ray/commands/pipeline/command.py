"""`rlhf-ray pipeline`: several commands in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.commands.options import ConfigFile, DryRun, Resume, ResumeMode, RunDir, interruptible


def pipeline(
    config: ConfigFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. seed=1, or sft.learner.lr=1e-4")] = None,
    run_dir: RunDir = None,
    resume: Resume = ResumeMode.never,
    dry_run: DryRun = False,
) -> None:
    """Several commands in a row, each fed by those before it: sft -> pairs -> rm -> rl -> eval."""
    run(config, overrides or [], run_dir, resume, dry_run)


def run(config: Path, overrides: list[str], run_dir: Path | None, resume: ResumeMode, dry_run: bool) -> None:
    from rlhf_ray.commands.pipeline.stages import describe_pipeline, run_pipeline

    if dry_run:
        print(describe_pipeline(config, overrides))
        return
    with interruptible("; go on with the same command and --resume auto"):
        summary = run_pipeline(config, overrides, run_dir, resume=resume is ResumeMode.auto)
    print(f"{len(summary['stages'])} stages in {summary['seconds']:.0f} s; everything is in {summary['run_dir']}")
