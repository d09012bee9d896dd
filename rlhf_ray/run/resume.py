"""What a resumed run may not change: the settings whose effect is already in its weights, or in its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.run.directory import RunDirectory

# The sections that decide which weights a run starts from.
POLICY = ("seed", "model", "warm_start")
# The settings that decide which prompts come, in which order, and how they are numbered.
STREAM = ("data", "plain_text", "rollout.prompts_per_step", "rollout.group_size", "learner.batch_size")


# The settings that decide how a checkpoint is laid out.
LAYOUT = ("dtype", "learner.engine", "critic.engine")
SHARDS = ("world_size", "zero_stage")


def refuse_other_beginnings(config: RunConfig, directory: RunDirectory, checkpoint: bool = True) -> None:
    """Compare `config` with what the run in `directory` was last started with.

    Args:
        checkpoint: whether there is one to go on from.
    Raises:
        ConfigError: naming every setting that would silently not apply to what is there already.
    """
    try:
        old = yaml.safe_load(directory.config_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return  # the first attempt did not get that far
    if not isinstance(old, dict):
        return
    new, problems = config.model_dump(mode="json"), []
    if changed := _changed(old, new, POLICY):
        problems.append(f"goes on with the policy that is there, and {_have(changed)} since it was made")
    if changed := _changes_of_stream(old, new):
        problems.append(
            f"goes on in the stream of prompts where the run stopped, and {_have(changed)} since: some prompts would "
            "be left out and others used twice"
        )
    if checkpoint and (changed := _changes_of_layout(old, new)):
        problems.append(f"goes on from a checkpoint that other settings cannot read, and {_have(changed)} since")
    if problems:
        raise ConfigError(
            f"{directory.path}: --resume auto {'; it also '.join(problems)} (see its config.yaml); "
            "set it back, or start anew in another --run-dir"
        )


def refuse_other_prompts(rollouts: Mapping[str, Any], prompts: str, directory: RunDirectory) -> None:
    """`rollouts`: that part of the checkpoint's state. `prompts`: the fingerprint of today's.

    Raises DataError where the position in the checkpoint counts in another stream.
    """
    if rollouts.get("prompts", prompts) != prompts:  # an older checkpoint does not know
        raise DataError(
            f"{directory.path}: the prompts have changed since its checkpoint was written, so that some would be left "
            "out and others used twice; restore the data file, or start anew in another --run-dir"
        )


def _changes_of_stream(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in STREAM:
        section = _at(new, name)
        names += [f"{name}.{key}" for key in section] if isinstance(section, dict) else [name]
    changed = _changed(old, new, names)
    if _at(old, "data.overlong_prompts") == "error" == _at(new, "data.overlong_prompts"):
        # None was left out for its length, so a higher limit changes nothing.
        changed = [name for name in changed if name != "data.max_prompt_tokens"]
    return changed


def _changes_of_layout(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    critics = [_at(tree, "algorithm.advantage") == "gae" for tree in (old, new)]
    if critics[0] != critics[1]:
        return ["algorithm.advantage"]
    roles = ["learner", "critic"] if critics[0] else ["learner"]
    sharded = [role for role in roles if _at(new, f"{role}.engine") == "deepspeed"]
    names = [name for name in LAYOUT if critics[0] or not name.startswith("critic")]
    if "auto" in (_at(old, "dtype"), _at(new, "dtype")):
        names.remove("dtype")  # what it stood for is not known here; the engines compare what they hold
    return _changed(old, new, [*names, *(f"{role}.{shard}" for role in sharded for shard in SHARDS)])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of `names` that both trees have and that differ; a setting that an older version did not know does not."""
    return [name for name in names if (before := _at(old, name, ...)) is not ... and before != _at(new, name)]


def _at(tree: Any, dotted: str, missing: Any = None) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return missing
        tree = tree[key]
    return tree


def _have(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed"
