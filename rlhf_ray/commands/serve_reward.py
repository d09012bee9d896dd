"""`rlhf-ray serve-reward`: reward functions behind HTTP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.commands.options import ConfigFile, DryRun, print_dry_run
from rlhf_ray.models.library_logs import quiet_libraries

if TYPE_CHECKING:
    from rlhf_ray.config.reward_server import RewardServerConfig
    from rlhf_ray.config.rewards import RewardModelConfig
    from rlhf_ray.rewards.calling import RewardFunction
    from rlhf_ray.rewards.server import RewardServer


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
    server = open_reward_server(settings)
    print(f"serving {', '.join(server.health()['rewards'])} at {server.url}; stop with Ctrl-C", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print("rlhf-ray: stopped", file=sys.stderr)
    finally:
        server.close()


def open_reward_server(config: RewardServerConfig) -> RewardServer:
    """It listens already; call `serve`.

    Raises:
        RlhfRayError: a reward, a token or an address that cannot be used.
    """
    from rlhf_ray.rewards.compose import RewardSet, reward_of
    from rlhf_ray.rewards.http_client import token_from
    from rlhf_ray.rewards.server import RewardServer

    token = token_from(config.token_env) if config.token_env else None
    functions = [reward_of(reward) for reward in config.rewards]
    if config.reward_model is not None:
        functions.append(_as_function(config.reward_model, config.device))
    return RewardServer(
        RewardSet(functions), config.host, config.port, token=token, max_body_mb=config.max_body_mb
    )  # fmt: skip


def _as_function(config: RewardModelConfig, device: str) -> RewardFunction:
    # A server of functions alone needs no torch, and starts at once.
    from rlhf_ray.models.devices import choose_hardware
    from rlhf_ray.models.loading import load_reward_model
    from rlhf_ray.rewards.calling import RewardFunction
    from rlhf_ray.roles.reward import RewardModel

    hardware = choose_hardware(device, "auto")
    network, tokenizer = load_reward_model(config.path, dtype=hardware.dtype, device=hardware.device)
    model = RewardModel(network, tokenizer, config)

    def reward_model(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return model.score(texts).values

    return RewardFunction("reward_model", reward_model, config.weight)
