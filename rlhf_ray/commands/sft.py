"""`rlhf-ray sft`: supervised fine-tuning."""

from __future__ import annotations

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, Restart, Resume, ResumeMode, RunDir
from rlhf_ray.commands.supervised import run


def sft(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    restart: Restart = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Supervised fine-tuning on answers, conversations, instructions or plain text."""
    run("sft", config, overrides, run_dir, resume, dry_run, restart)
