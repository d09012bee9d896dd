"""`rlhf-ray rm`: a reward model."""

from __future__ import annotations

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, Restart, Resume, ResumeMode, RunDir
from rlhf_ray.commands.supervised import run


def rm(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    restart: Restart = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Train a reward model on pairs or rankings of answers."""
    run("rm", config, overrides, run_dir, resume, dry_run, restart)
