"""`rlhf-ray classifier`: a sequence classifier."""

from __future__ import annotations

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, Restart, Resume, ResumeMode, RunDir
from rlhf_ray.commands.supervised import run


def classifier(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    restart: Restart = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Fine-tune a sequence classifier on labelled texts; its folder can serve as a reward model."""
    run("classifier", config, overrides, run_dir, resume, dry_run, restart)
