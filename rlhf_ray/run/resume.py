"""What a resumed run may not change: the settings whose effect is already in its weights or prompts, and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml

from rlhf_ray.config.clock import Dated, at_moment
from rlhf_ray.config.engines import TRAINERS, trainer_facts
from rlhf_ray.config.formula_names import ADVANTAGES, OWN_ADVANTAGE
from rlhf_ray.config.redacted import redacted_settings
from rlhf_ray.config.sections import TrainingRunConfig
from rlhf_ray.data.fingerprint import CHAT_TEMPLATE
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.storage import read_object

# The sections that decide which weights a run starts from.
POLICY = ("seed", "model", "warm_start")
# The settings that decide which prompts come, in which order, and how they are numbered.
STREAM = (
    "data", "plain_text", "sft_data", "rollout.prompts_per_step", "rollout.group_size", "rollout.order",
    "learner.batch_size",
)  # fmt: skip
# How a network in training is laid out over processes: any of these engines goes on from what any other wrote.
LAYOUT = ("engine", "world_size", "zero_stage")
# What a critic begins as, and what DPO's reference is: asked for once.
CRITIC, REFERENCE = ("critic.path",), ("dpo.reference",)
# What chat templates take for now.
DATE = ("clock",)
# The settings whose effect at a step depends on how many there are.
SCHEDULES = (
    "learner.lr_schedule", "critic.lr_schedule", "learner.lr_warmup_ratio", "critic.lr_warmup_ratio",
    "rollout.temperature_end", "algorithm.kl_coef_end",
    "algorithm.entropy_coef_end", "algorithm.kl_target_end",
)  # fmt: skip
# In a checkpoint: the config that it was made with, the fingerprints of the data, and what the run remembers.
BEGINNING = "beginning.json"
# What a run directory may hold that was made from the rows of the data.
MADE_FROM_ROWS = ("checkpoints", "start", "before.json", "reference.json")


def refuse_other_beginnings(config: TrainingRunConfig, directory: RunDirectory, checkpoint: bool = True) -> None:
    """Compare `config` with what the run in `directory` was last started with.

    Args:
        checkpoint: whether there is one to go on from.
    Raises:
        ConfigError: naming every setting that would silently not apply to what is there already.
    """
    old, new, problems = config_before(directory), redacted_settings(config.model_dump(mode="json")), []
    if changed := _changed(old, new, POLICY):
        problems.append(f"goes on with the policy that is there, and {_have(changed)} since it was made")
    if changed := _changes_of_stream(old, new):
        problems.append(
            f"goes on in the stream of prompts where the run stopped, and {_have(changed)} since: some prompts would "
            "be left out and others used twice"
        )
    if checkpoint and (changed := _changes_of_layout(old, new)):
        problems.append(f"goes on from a checkpoint that other settings cannot read, and {_have(changed)} since")
    if checkpoint and _has_critic(new) and (changed := _changed(old, new, CRITIC)):
        problems.append(f"goes on with the critic of the checkpoint, and {_have(changed)} since it was made")
    if (directory.path / "reference.json").exists() and (changed := _changed(old, new, REFERENCE)):
        problems.append(f"goes on with the log-probabilities in reference.json, and {_have(changed)} since")
    if changed := _changed(old, new, DATE):
        problems.append(f"goes on with prompts of the date that they had at its start, and {_have(changed)} since")
    if problems:
        raise ConfigError(
            f"{directory.path}: --resume auto {'; it also '.join(problems)} (see its config.yaml); "
            "set it back, or start anew in another --run-dir"
        )


def changes_to_say(
    config: TrainingRunConfig, data: Mapping[str, str] | None, directory: RunDirectory
) -> dict[str, str]:
    """What is another in the resumed run, and allowed: by kind of event, for people.

    Args:
        data: fingerprints of today's rows, by source; None: nobody has read any.
    Raises:
        DataError: something is there already that was made from other rows.
    """
    said = {}
    if layout := _other_layout(config, directory):
        said["layout_changed"] = layout
    if length := _other_length(config, directory):
        said["length_changed"] = length
    if data is not None and (rows := _other_rows(data, directory)):
        said["data_changed"] = rows
    return said


def frozen_clock(config: Dated, directory: RunDirectory) -> Dated:
    """`config` at the moment that its chat templates take for now: set by hand, or that of the run's first start."""
    return at_moment(config, begun(directory))


def begun(directory: RunDirectory) -> datetime:
    """When the run first started. Its config.yaml says so; where an older version kept no clock, its first event."""
    moment = None
    if directory.resumed:
        events = directory.read_events()
        moment = _moment_in(config_before(directory), "clock") or _moment_in(events[0] if events else {}, "time")
    return moment or datetime.now().replace(microsecond=0)


def _moment_in(tree: Mapping[str, Any], name: str) -> datetime | None:
    try:
        return datetime.fromisoformat(str(tree.get(name)))
    except ValueError:
        return None


def _other_rows(data: Mapping[str, str], directory: RunDirectory) -> str | None:
    made = [name for name in MADE_FROM_ROWS if (directory.path / name).exists()]
    old = _beginning(directory).get("data") or read_object(directory.data_file)
    if not old or not all(isinstance(text, str) for text in old.values()):
        unknown = "this run kept no fingerprint of its data, so whether that is still the same is not known"
        return unknown if made else None
    changed = [_said(name, old[name], value) for name, value in data.items() if old.get(name, value) != value]
    if changed and made:
        raise DataError(
            f"{directory.path}: the data has changed since the run began: {'; '.join(changed)}. Going on, some rows "
            "would be left out and others used twice, and what was measured before could not be compared; restore the "
            "data, or start anew in another --run-dir"
        )
    if changed:
        return f"the data has changed since the run began, and nothing was made from it yet: {'; '.join(changed)}"
    # An older version kept none of the template.
    if others := [name for name in data if name not in old and name != CHAT_TEMPLATE]:
        return f"read now and not when the run began, so what is measured on it cannot be compared: {', '.join(others)}"
    return None


def _said(name: str, before: str, now: str) -> str:
    if name == CHAT_TEMPLATE:
        return f"{name}, so the same rows would be other texts"
    counts = [text.partition(" ")[0] for text in (before, now)]
    if counts[0] != counts[1]:
        return f"{name} ({counts[0]} rows then, {counts[1]} now)"
    return f"{name} ({counts[0]} rows as before, with other content or in another order)"


def _other_length(config: TrainingRunConfig, directory: RunDirectory) -> str | None:
    old, new = _old_config(directory), redacted_settings(config.model_dump(mode="json"))
    changed = _changed(old, new, ("epochs", "steps"))
    if not changed:
        return None
    pairs = ", ".join(f"{name} {_at(old, name)} -> {_at(new, name)}" for name in changed)
    moving = ", ".join(f"{name}={_at(new, name)}" for name in SCHEDULES if _moves(new, name))
    follows = f"; what moves over the run ({moving}) is from here on where the new length has it" if moving else ""
    return f"the run's length has changed since it began: {pairs}{follows}"


def _moves(config: Mapping[str, Any], name: str) -> bool:
    """Whether a setting of SCHEDULES has an effect in this config."""
    role, _, setting = name.rpartition(".")
    if role == "critic" and not _has_critic(config):
        return False
    if setting == "lr_warmup_ratio":
        return _at(config, f"{role}.lr_warmup_steps") is None and bool(_at(config, name))
    return _at(config, name) not in (None, "constant")


def _changes_of_stream(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in STREAM:
        section = _at(new, name)
        both = isinstance(section, dict) and isinstance(_at(old, name), dict)
        names += [f"{name}.{key}" for key in section] if both else [name]
    changed = _changed(old, new, names)
    if "kto" in (_at(old, "dpo.kind"), _at(new, "dpo.kind")):  # of a pair it makes two rows
        changed += _changed(old, new, ["dpo.kind"])
    if _at(old, "data.overlong_prompts") == "error" == _at(new, "data.overlong_prompts"):
        # None was left out for its length, so a higher limit changes nothing.
        changed = [name for name in changed if name != "data.max_prompt_tokens"]
    return changed


def _changes_of_layout(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    critics = [_has_critic(tree) for tree in (old, new)]
    if critics[0] != critics[1]:
        return ["algorithm.advantage"]
    # What `auto` stood for is not known here; the engines compare what they hold.
    names = [] if "auto" in (_at(old, "dtype"), _at(new, "dtype")) else ["dtype"]
    own = [f"{role}.engine" for role in _roles(new) if not {_at(old, f"{role}.engine"), _at(new, f"{role}.engine")}
           <= TRAINERS.keys()]  # fmt: skip
    return _changed(old, new, [*names, *own])


def _other_layout(config: TrainingRunConfig, directory: RunDirectory) -> str | None:
    old, new = config_before(directory), redacted_settings(config.model_dump(mode="json"))
    names = [
        f"{role}.{name}" for role in _roles(new) for name in LAYOUT
        if name == "engine" or any(trainer_facts(_at(tree, f"{role}.engine") or "").shards for tree in (old, new))
    ]  # fmt: skip
    if not (changed := _changed(old, new, names)):
        return None
    pairs = ", ".join(f"{name} {_at(old, name)} -> {_at(new, name)}" for name in changed)
    return (
        f"laid out over other processes: {pairs}; weights, optimiser and all counters go on as they were, but sums "
        "over rows are now made in another order, so what follows is not bit-equal to the run without this change"
    )


def _roles(tree: Mapping[str, Any]) -> list[str]:
    return ["learner", "critic"] if _has_critic(tree) else ["learner"]


def _has_critic(tree: Mapping[str, Any]) -> bool:
    return ADVANTAGES.get(_at(tree, "algorithm.advantage"), OWN_ADVANTAGE).baseline == "critic"


def config_before(directory: RunDirectory) -> dict[str, Any]:
    """What the newest checkpoint was made with, for its copy is verified; where none has kept that, what the run was
    last started with. Empty where the first attempt did not get that far, or where its file cannot be read."""
    return _tree(_beginning(directory).get("config")) or _old_config(directory)


def _beginning(directory: RunDirectory) -> dict[str, Any]:
    return Checkpoints(directory.checkpoints).small_file(BEGINNING)


def _old_config(directory: RunDirectory) -> dict[str, Any]:
    try:
        return _tree(directory.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _tree(text: str | None) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text or "")
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return redacted_settings(tree) if isinstance(tree, dict) else {}  # an older version hid nothing


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
