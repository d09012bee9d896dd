"""`rlhf-ray merge`: a model folder out of a checkpoint, without its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.models.library_logs import quiet_libraries


def merge(
    run: Annotated[Path, typer.Argument(help="a run's directory: of rl, sft, rm, dpo or classifier")],
    step: Annotated[int | None, typer.Option(help="of which checkpoint; default: the newest whole one")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the folder to write, which may not be there yet; default RUN/merged/step_N")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the LoRA adapter alone, not merged")] = False,
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder: LoRA merged, ZeRO's parts put together.

    In this process alone; the weights pass through memory shard by shard.
    """
    quiet_libraries("cpu")
    from rlhf_ray.start import merge as start

    made = start.merge(run, step, out, "adapter" if adapter else "model", lambda text: typer.echo(text, err=True))
    print(made)
