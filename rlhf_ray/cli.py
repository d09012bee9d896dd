"""The command line: its commands are in commands/, a file or a folder each.

Heavy packages are imported inside the commands, so that `rlhf-ray --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from rlhf_ray.commands.classifier import classifier
from rlhf_ray.commands.doctor.command import doctor
from rlhf_ray.commands.dpo import dpo
from rlhf_ray.commands.eval import evaluate
from rlhf_ray.commands.generate.command import generate
from rlhf_ray.commands.hints import HintingGroup
from rlhf_ray.commands.init.command import init
from rlhf_ray.commands.merge import merge
from rlhf_ray.commands.pairs import pairs
from rlhf_ray.commands.pipeline.command import pipeline
from rlhf_ray.commands.plan import plan
from rlhf_ray.commands.quickstart import quickstart
from rlhf_ray.commands.replay import replay
from rlhf_ray.commands.rl import rl
from rlhf_ray.commands.rm import rm
from rlhf_ray.commands.serve_reward import serve_reward
from rlhf_ray.commands.sft import sft
from rlhf_ray.commands.validate_data import validate_data
from rlhf_ray.config.redacted import legible, redacted
from rlhf_ray.errors import AGAIN, CONFIG, DATA, DIVERGED, INTERRUPTED, UNEXPECTED, RlhfRayError, exit_status
from rlhf_ray.models.library_logs import quiet
from rlhf_ray.models.threads import wait_briefly
from rlhf_ray.run.stopping import terminated

app = typer.Typer(
    name="rlhf-ray",
    cls=HintingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=(
        f"Exit status: 0 done; {CONFIG} the settings are wrong; {DATA} data, a model, a reward or a checkpoint cannot "
        f"be used; {DIVERGED} the training has diverged; {AGAIN} a worker, the cluster or the disk failed: the same "
        f"with --resume auto may work; {INTERRUPTED} interrupted; {UNEXPECTED} anything else."
    ),
)

for command in (
    quickstart, init, sft, rm, dpo, classifier, rl, merge, replay, evaluate, generate, pairs, pipeline, plan,
    validate_data, serve_reward, doctor,
):  # fmt: skip
    app.command(name="eval" if command is evaluate else None)(command)


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


def _plain_warnings() -> None:
    """Warnings without the place in the source that they come from; those that libraries mean for programmers: none."""
    warnings.formatwarning = lambda message, *_: f"rlhf-ray: warning: {legible(redacted(str(message)))}\n"
    if not sys.warnoptions:  # python -W
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


def main() -> None:
    """Entry point: this package's errors are one readable paragraph, not a traceback."""
    wait_briefly()
    quiet()
    _plain_warnings()
    signal.signal(signal.SIGTERM, terminated)
    try:
        app()
    except RlhfRayError as error:
        print(f"rlhf-ray: {legible(redacted(str(error)))}", file=sys.stderr)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
