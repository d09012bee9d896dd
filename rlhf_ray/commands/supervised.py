"""`rlhf-ray sft`, `rm`, `dpo`, `classifier`: one loop, so one body; their command lines are beside it."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.commands.options import ResumeMode, interruptible, print_dry_run
from rlhf_ray.commands.restart import restart_and_exit, watched
from rlhf_ray.models.library_logs import quiet_libraries


def run(
    command: str, config: Path, overrides: list[str] | None, run_dir: Path | None, resume: ResumeMode, dry_run: bool,
    restart: int,
) -> None:  # fmt: skip
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.supervised import SCHEMAS

    settings = load_config(config, overrides or [], SCHEMAS[command])
    if dry_run:
        from rlhf_ray.start.plan import describe_supervised_plan

        print_dry_run(settings, describe_supervised_plan)
        return
    again = resume is ResumeMode.auto
    if restart:
        restart_and_exit(command, settings, config, overrides or [], run_dir, again, restart)
    quiet_libraries(settings.device)
    from rlhf_ray.commands.summary import print_summary
    from rlhf_ray.start.supervised import run_supervised

    with interruptible(), watched(settings.ray):  # the run itself has said how to go on
        summary = run_supervised(settings, run_dir, resume=again)
    print_summary(summary, writes=command in ("sft", "dpo"))
