"""`rlhf-ray doctor`: what this machine can run."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check this machine: versions, devices, Ray, vLLM, DeepSpeed, memory, disk. Each failing line names its remedy."""
    from rlhf_ray.commands.doctor.checks import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json))
