"""`rlhf-ray plan`: which layout on how many devices, before there are any."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlhf_ray.config.schema import RunConfig
    from rlhf_ray.models.size import Size


def plan(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [OVERRIDES]...", help="a YAML file of `rlhf-ray rl` and settings to change; "
                       "with --model also settings alone, as rollout.group_size=16"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder, a name in the local cache, or a shape, as qwen2-7b or llama-70b")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=1 << 14, help="how many there are")] = 1,
    device: Annotated[str, typer.Option(help="their kind, as h100, a100-40 or mi300x")] = "h100",
    nodes: Annotated[int | None, typer.Option(min=1, help="machines; empty: as the kind is usually sold")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of each device; empty: as its data sheet")] = None,
    host_memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of each machine; empty: 256 for each of its devices")
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="mean tokens of a prompt; empty: data.max_prompt_tokens")
    ] = None,
    answer_tokens: Annotated[
        float | None, typer.Option(help="mean tokens of an answer; empty: rollout.max_new_tokens")
    ] = None,
    rates: Annotated[Path | None, typer.Option(help="a YAML file of rates that you measured: docs/plan.md")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:  # fmt: skip
    """Memory, time and cost of an RL run on devices that you may not have yet, and the layout to run it in."""
    from rlhf_ray.models.library_logs import quiet_libraries
    from rlhf_ray.scale.make_case import Wishes, make_case
    from rlhf_ray.scale.page import as_dict, as_text
    from rlhf_ray.scale.planner import plan_of

    quiet_libraries("cpu")
    given = list(run or [])
    file = given.pop(0) if given and "=" not in given[0] else None
    settings = settings_of(file, given, model)
    wishes = Wishes(device, devices, nodes, memory, host_memory, rates, prompt_tokens, answer_tokens)
    case = make_case(settings, *model_of(settings), wishes)
    found = plan_of(case, as_written=file is not None and settings.executor == "ray")  # one process has no layout
    if as_json:
        import json

        print(json.dumps(as_dict(case, found), indent=1))
    else:
        print(as_text(case, found, file))


def settings_of(file: str | None, overrides: list[str], model: str | None) -> RunConfig:
    """Raises ConfigError: neither a file nor a model, or what a run refuses."""
    from rlhf_ray.config.load import config_of, load_config
    from rlhf_ray.config.schema import RunConfig
    from rlhf_ray.config.shipped import PREFIX, shipped_config
    from rlhf_ray.errors import ConfigError

    if model is not None:
        overrides = [f"model.path={model}", *overrides]
    if file is not None:
        path = shipped_config(file.removeprefix(PREFIX)) if file.startswith(PREFIX) else Path(file)
        return load_config(path, overrides)
    if model is None:
        raise ConfigError(
            "plan needs a run: name its YAML file (rlhf-ray plan run.yaml --devices 8), or a model with settings "
            "(rlhf-ray plan --model qwen2-7b --devices 8 algorithm.name=ppo rollout.max_new_tokens=1024)"
        )
    tree = {"data": {"path": "task:arithmetic"}, "rewards": [{"function": "exact_answer"}], "model": {}}
    return config_of(tree, overrides, RunConfig, source="plan")


def model_of(settings: RunConfig) -> tuple[PreTrainedConfig, Size]:
    """The policy's config and size: of a folder, of the local cache, of a model to be built, or of a named shape.

    Raises ConfigError, ModelError: none of them.
    """
    from rlhf_ray.models.loading import load_shape
    from rlhf_ray.scale.make_case import size_of_shape
    from rlhf_ray.scale.shapes import require_shape
    from rlhf_ray.start.plan import built_shape, model_size

    path = settings.model.path
    if path.startswith("scratch:"):
        return built_shape(settings), model_size(settings)
    size = model_size(settings)
    if size is not None:
        return load_shape(path, trust_remote_code=settings.model.trust_remote_code), size
    unknown = f"model.path={path} is neither on this machine nor the name of a shape, and nothing is downloaded here"
    shape = require_shape(path, unknown)
    return shape, size_of_shape(shape, settings.model.lora)
