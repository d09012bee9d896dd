"""The command line: its commands are in commands/, one file each.

Heavy packages are imported inside the commands, so that `rlhf-ray --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from rlhf_ray.commands import (
    classifier,
    doctor,
    dpo,
    eval,
    generate,
    init,
    pairs,
    pipeline,
    quickstart,
    rl,
    rm,
    serve_reward,
    sft,
    validate_data,
)
from rlhf_ray.commands.hints import HintingGroup
from rlhf_ray.errors import RlhfRayError, Terminated
from rlhf_ray.library_logs import quiet
from rlhf_ray.threads import wait_briefly

app = typer.Typer(
    name="rlhf-ray",
    cls=HintingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    quickstart.quickstart, init.init, sft.sft, rm.rm, dpo.dpo, classifier.classifier, rl.rl, eval.evaluate,
    generate.generate, pairs.pairs, pipeline.pipeline, validate_data.validate_data, serve_reward.serve_reward,
    doctor.doctor,
):  # fmt: skip
    app.command(name="eval" if command is eval.evaluate else None)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"rlhf-ray {version('rlhf-ray')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version, then stop")
    ] = False,
) -> None:
    """Align language models with reinforcement learning, on one machine or on a Ray cluster."""


def _terminated(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # a second one must not interrupt the run's last words
    raise Terminated


def _plain_warnings() -> None:
    """Warnings without the place in the source that they come from; those that libraries mean for programmers: none."""
    warnings.formatwarning = lambda message, *_: f"rlhf-ray: warning: {message}\n"
    if not sys.warnoptions:  # python -W
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


def main() -> None:
    """Entry point: this package's errors are one readable paragraph, not a traceback."""
    wait_briefly()
    quiet()
    _plain_warnings()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except RlhfRayError as error:
        print(f"rlhf-ray: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
