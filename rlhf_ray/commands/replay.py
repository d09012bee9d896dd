"""`rlhf-ray replay`: a step that was not finite, computed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.commands.options import Overrides
from rlhf_ray.errors import DIVERGED
from rlhf_ray.models.library_logs import quiet_libraries

if TYPE_CHECKING:
    from rlhf_ray.start.replay import Replayed

MOST_SHOWN = 20  # lines of a table, tokens of a row; --json has all


def replay(
    step: Annotated[Path, typer.Argument(help="what a run has kept of the step: RUN/bad_steps/step_N")],
    overrides: Overrides = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="a checkpoint (RUN/checkpoints/step_N) or a model's folder; default: the newest checkpoint "
                     "before the step, or what comes nearest"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all that was found as one JSON object")] = False,
) -> None:  # fmt: skip
    """Compute a bad step again, in one process, and say which rows, losses and gradients are not finite.

    Exit status 0: all is finite now; 4: something still is not.
    """
    quiet_libraries("auto")
    from rlhf_ray.run.storage import to_json
    from rlhf_ray.start import replay as start

    found = start.replay(step, overrides or [], weights, lambda text: typer.echo(text, err=as_json))
    if as_json:
        print(to_json(described(found), indent=1))
    else:
        _print(found)
    if not found.finite:
        raise typer.Exit(DIVERGED)


def described(found: Replayed) -> dict[str, Any]:
    """All of it, as --json prints it: `numbers` of the batch, and of each role that learns its `passes`."""
    roles = {name: examined for name, examined in found.roles.items() if examined.passes}
    return {
        "step": found.step.step, "why": found.step.why, "kl_coef": found.step.kl_coef, "weights": found.weights,
        "finite": found.finite,
        "numbers": [vars(one) for examined in found.roles.values() for one in examined.numbers],
        "roles": {
            name: {"passes": [vars(one) for one in examined.passes], "grad_norms": examined.grad_norms}
            for name, examined in roles.items()
        },
    }  # fmt: skip


def _print(found: Replayed) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    numbers = [one for examined in found.roles.values() for one in examined.numbers]
    if numbers:
        table = Table("what", "row", "tokens", title="Not finite in the batch and its forward pass")
        for one in numbers[:MOST_SHOWN]:
            table.add_row(one.what, str(one.row), _listed(one.tokens))
        console.print(table)
    for name, examined in found.roles.items():
        if not examined.passes:
            continue
        # Those that are not finite come first, for the table may be cut.
        passes = sorted(examined.passes, key=lambda one: one.finite)
        columns = ("optimiser step", "rank", "micro-batch", "rows", "loss", "gradient norm", "rows not finite")
        table = Table(*columns, title=name)
        for one in passes[:MOST_SHOWN]:
            places = (one.optimiser_step, one.rank, one.microbatch, len(one.rows))
            values = f"{one.loss:.4g}", f"{one.grad_norm:.4g}", _listed(one.bad_rows)
            table.add_row(*map(str, places), *values)
        console.print(table)
        print(f"{name}: gradient norm of each optimiser step: {', '.join(f'{x:.4g}' for x in examined.grad_norms)}")
    print("all is finite now" if found.finite else "not all is finite; --json lists everything")


def _listed(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values[:MOST_SHOWN])) + (" …" if len(values) > MOST_SHOWN else "")
