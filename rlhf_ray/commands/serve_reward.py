"""`rlhf-ray serve-reward`: reward functions behind HTTP."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rlhf_ray.commands.options import ConfigFile, DryRun, print_dry_run
from rlhf_ray.library_logs import quiet_libraries


def serve_reward(
    config: ConfigFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. port=9000")] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve reward functions over HTTP, for runs that name this machine's URL as their reward."""
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.reward_server import RewardServerConfig

    settings = load_config(config, overrides or [], RewardServerConfig)
    if dry_run:
        print_dry_run(settings)
        return
    if settings.reward_model is not None:
        quiet_libraries(settings.device)
    from rlhf_ray.serve import open_reward_server

    server = open_reward_server(settings)
    print(f"serving {', '.join(server.health()['rewards'])} at {server.url}; stop with Ctrl-C", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print("rlhf-ray: stopped", file=sys.stderr)
    finally:
        server.close()
