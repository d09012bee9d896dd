"""What somebody wants of a run, as `rlhf-ray init` is told it.

What cannot be meant is refused before a file is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.commands.init.look import Command, Look
from rlhf_ray.config.user_paths import is_file, typed_path
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.loading import check_builtin, find_function, is_builtin, is_http

COMMANDS: dict[Command, str] = {
    "sft": "answers to learn by heart: supervised fine-tuning",
    "rm": "pairs of a better and a worse answer: a reward model",
    "dpo": "the same pairs, without a reward model: direct preference optimisation",
    "rl": "prompts, and a reward for what the model answers: GRPO, PPO and their relatives",
}
SCRATCH = ("qwen2", "gpt2", "lstm")
DEFAULT_MODEL, DEFAULT_REWARD = "scratch:qwen2", "reward.py:score"
# Settings without which these do not run; init writes them for the reader to change.
REWARD_ARGS: dict[str, dict[str, Any]] = {
    "keyword": {"keywords": ["thanks", "please"]},
    "regex": {"pattern": ".*[.!?]"},
    "length_penalty": {"free_tokens": 32},
}
# The column that they compare with, and whether another may be named.
_COMPARES_WITH = {"exact_answer": ("answer", False), "math": ("answer", True), "rouge": ("reference", True)}
# These need a model, tests or a server of their own: docs/rewards.md.
_BY_HAND = ("classifier", "code", "judge")
_NAME = re.compile(r"[^\W\d]\w*$")


@dataclass(frozen=True)
class Wishes:
    """`reward` and `reward_model` are for `rl` alone. `names`: roles whose columns have names of their own."""

    command: Command
    data: Look
    model: str
    out: Path
    reward: str | None = None
    reward_model: str | None = None
    where: Literal["local", "ray"] = "local"
    names: tuple[tuple[str, str], ...] = ()

    @property
    def from_scratch(self) -> bool:
        return self.model.startswith("scratch:")

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that a model folder takes; None for other models, and where it is not said."""
        try:
            shape = json.loads((typed_path(self.model) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        said = shape.get("max_position_embeddings", shape.get("n_positions")) if isinstance(shape, dict) else None
        return said if isinstance(said, int) and said > 0 else None

    @property
    def own_reward(self) -> tuple[str, str] | None:
        """(file, function) of a reward in a file of the user's own."""
        place, _, function = (self.reward or "").rpartition(":")
        return (place, function) if place.endswith(".py") else None


def check_command(name: str) -> Command:
    """Raises ConfigError for a command that init writes nothing for."""
    if name not in COMMANDS:
        raise ConfigError(f"{name!r} is none of {', '.join(COMMANDS)}")
    return name


def check_where(name: str) -> Literal["local", "ray"]:
    """Raises ConfigError for another place."""
    if name not in ("local", "ray"):
        raise ConfigError(f"{name!r} is neither local nor ray")
    return name


def check_model(model: str) -> str:
    """The model's name for a config; `scratch` is short for the default. Raises RlhfRayError for what is none."""
    from rlhf_ray.models.loading import local_folder

    if model.partition(":")[0] == "scratch":
        kind = model.partition(":")[2] or DEFAULT_MODEL.partition(":")[2]
        if kind not in SCRATCH:
            known = ", ".join(f"scratch:{name}" for name in SCRATCH)
            raise ConfigError(f"--model {model}: no such model is built here; choose {known}, a folder or a Hub name")
        return f"scratch:{kind}"
    folder = local_folder(model)
    if folder is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: the folder has no config.json, so it holds no Hugging Face model")
    return model


def check_reward(reward: str, data: Look) -> str:
    """The reward's name for a config. Raises ConfigError for one that could not run on these rows."""
    if is_http(reward):
        return reward
    if is_builtin(reward):
        check_builtin(reward)
        if reward in _BY_HAND:
            raise ConfigError(
                f"--reward {reward}: it needs settings of its own; write them by hand (docs/rewards.md), and begin "
                f"with --reward {DEFAULT_REWARD}"
            )
        _check_column(reward, data)
        return reward
    place, _, function = reward.rpartition(":")
    if not _NAME.match(function):
        raise ConfigError(f"--reward {reward}: {function!r} is no name of a function; give file.py:function")
    if not place.endswith(".py") or is_file(typed_path(place)):
        find_function(reward)  # it is there, so it must be right; a file that is not there will be written
    return reward


def rewards_for(data: Look) -> list[str]:
    """The built-in rewards that need no package and can judge answers to these rows, the likeliest first."""
    compared = [name for name in ("exact_answer", "math") if _column_for(name, data)]
    installed = [name for name in compared if name != "math" or find_spec("math_verify")]
    return [*installed, "sentiment", "keyword", "regex", "length_penalty", "repetition_penalty"]


def reward_args(reward: str, data: Look) -> dict[str, Any]:
    """The settings that a built-in reward is given to begin with."""
    usual = _COMPARES_WITH.get(reward, (None, False))[0]
    column = _column_for(reward, data)
    return {"column": column} if column and column != usual else REWARD_ARGS.get(reward, {})


def _column_for(reward: str, data: Look) -> str | None:
    """The column that a reward compares with; None where it has none, or the rows have none."""
    usual, free = _COMPARES_WITH.get(reward, (None, False))
    if usual in data.columns:
        return usual
    return data.answer if free else None


def _check_column(reward: str, data: Look) -> None:
    if reward in _COMPARES_WITH and data.kind is not None and _column_for(reward, data) is None:
        raise ConfigError(
            f"--reward {reward}: it compares with the column {_COMPARES_WITH[reward][0]!r}, and {data.source} has "
            f"{', '.join(data.columns)}; rename the column, or use another reward"
        )
