"""`rlhf-ray rl`: reinforcement learning."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.commands.options import (
    ConfigFile,
    DryRun,
    Overrides,
    Restart,
    Resume,
    ResumeMode,
    RunDir,
    interruptible,
    print_dry_run,
)
from rlhf_ray.commands.restart import restart_and_exit, watched
from rlhf_ray.models.library_logs import quiet_libraries


def rl(
    config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = ResumeMode.never,
    restart: Restart = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Reinforcement learning: PPO, GRPO and their relatives."""
    run(config, overrides or [], run_dir, resume, dry_run, restart)


def run(
    config: Path, overrides: list[str], run_dir: Path | None, resume: ResumeMode, dry_run: bool, restart: int = 0
) -> None:
    from rlhf_ray.config.load import load_config

    settings = load_config(config, overrides)
    if dry_run:
        from rlhf_ray.start.plan import describe_plan

        print_dry_run(settings, describe_plan)
        return
    again = resume is ResumeMode.auto
    if restart:
        restart_and_exit("rl", settings, config, overrides, run_dir, again, restart)
    quiet_libraries(settings.device)
    from rlhf_ray.commands.summary import print_summary
    from rlhf_ray.start.rl import run_rl

    with interruptible(), watched(settings.ray):  # the run itself has said how to go on
        summary = run_rl(settings, run_dir, resume=again)
    print_summary(summary, writes=True)
