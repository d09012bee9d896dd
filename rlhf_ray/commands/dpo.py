"""`rlhf-ray dpo`: preferences without a reward model."""

from __future__ import annotations

from rlhf_ray.commands.options import ConfigFile, DryRun, Overrides, Restart, Resume, ResumeMode, RunDir
from rlhf_ray.commands.supervised import run


def dpo(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    restart: Restart = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Direct preference optimisation on pairs or rankings (DPO, IPO, cDPO, SimPO, ORPO) or single answers (KTO)."""
    run("dpo", config, overrides, run_dir, resume, dry_run, restart)
