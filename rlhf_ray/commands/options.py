"""What several commands take on their command line, and what they do before and after their work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_ray.config.shipped import PREFIX, shipped_config
from rlhf_ray.errors import INTERRUPTED
from rlhf_ray.models.library_logs import quiet_libraries


def _shipped_or_given(path: Path) -> Path:
    name = str(path)
    return shipped_config(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else path


ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="a YAML file; see configs/, which an installed package has too: shipped:grpo_reviews.yaml",
        callback=_shipped_or_given,
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, e.g. learner.lr=1e-6")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="where the run writes; default runs/<name>-<time>")]


class ResumeMode(str, Enum):
    auto = "auto"
    never = "never"


Resume = Annotated[
    ResumeMode, typer.Option("--resume", help="auto: go on from the newest checkpoint; never: start anew")
]
Restart = Annotated[
    int,
    typer.Option(
        "--restart", min=0, help="start again, with --resume auto, after a fault that is not the run's own (status "
        "75, or a kill): so often in a row without a new checkpoint"
    ),
]  # fmt: skip
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="open all that the run would read, print the resolved config and its needs")
]


def print_dry_run(settings: Any, describe: Callable[[Any], str] | None = None) -> None:
    """Opens what the command would read, then prints the resolved settings, what `describe` says of them, and what was
    opened. Raises RlhfRayError for what cannot be used, before anything is printed.
    """
    from rlhf_ray.config.load import dump_config
    from rlhf_ray.start.preflight import preflight

    quiet_libraries(settings.device)
    plan = [] if describe is None else [describe(settings)]
    opened = preflight(settings)
    print(dump_config(settings))
    print("\n".join([*plan, *opened]))


@contextmanager
def interruptible(how_to_go_on: str = "") -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with status 130 and a line, for typer would end with a bare status."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"rlhf-ray: interrupted{how_to_go_on}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
