"""`--dry-run`: opens whatever a command would read, in seconds, before anything is made.

Nothing is downloaded: what lies on the Hub and not in the local cache is named instead of opened; and so is what a
stage of a pipeline has yet to make. Of a large dataset only the first rows are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config.evaluation import EvalRunConfig, SampledRunConfig
from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.judge import JudgeConfig
from rlhf_ray.config.names import is_own
from rlhf_ray.config.redacted import redacted
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import RowsConfig, Section, TrainingRunConfig
from rlhf_ray.config.supervised import DPOConfig, SFTConfig, SupervisedConfig
from rlhf_ray.config.user_code import find
from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.data.paths import HUB_PREFIX, looks_local
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.tasks import is_task
from rlhf_ray.errors import ConfigError, DataError

# More rows would cost more seconds than their answers are worth; but held-out rows must fit.
MOST_ROWS = 2000

Config = TypeVar("Config", bound=Section)


@dataclass(frozen=True)
class RowsToOpen:
    """A dataset that a command reads. `held_out`: so many of its rows are kept apart, as the setting `key` says."""

    path: str
    split: str
    held_out: int = 0
    key: str = ""


def preflight(config: Section, unmade: Path | None = None) -> list[str]:
    """Opens packages, what the user has written, models' configs, tokenizers and data. Returns lines for people.

    `unmade`: a folder that an earlier stage of a pipeline will fill; paths in it cannot be opened yet.

    Raises:
        RlhfRayError: the first thing that cannot be used, by name.
    """
    require(needs_of(config))
    functions = rewards_of(config)
    _open_rewards(functions)
    own = _open_own_code(config)
    later = {path: "made by an earlier stage" for path in (*models_of(config), *(r.path for r in rows_of(config)))
             if unmade is not None and Path(path).is_relative_to(unmade)}  # fmt: skip
    later |= {path: _on_hub(path) for path in models_of(config) if path not in later and _only_on_hub(path)}
    later |= {rows.path: _on_hub(rows.path) for rows in rows_of(config)
              if rows.path not in later and not _is_here(rows.path)}  # fmt: skip
    if later:  # tokens cannot be counted without a tokenizer; what is here is opened by itself
        _open_models([path for path in models_of(config) if path not in later])
        _open_rows([rows for rows in rows_of(config) if rows.path not in later])
    else:
        _open_all(limited(config))
    read = [path for path in (*models_of(config), *(rows.path for rows in rows_of(config))) if path not in later]
    opened = dict.fromkeys([*read, *(redacted(reward.function) for reward in functions), *own])
    lines = [f"# opened: {', '.join(opened)}"] if opened else []
    return lines + [f"# not opened: {path} ({why})" for path, why in later.items()]


def _on_hub(path: str) -> str:
    """Why it is not opened. A mistyped folder looks like `owner/name` too, so what is beside it is named."""
    folder = typed_path(path).parent
    if "/" not in path or not is_folder(folder):
        return "on the Hub, and a dry run downloads nothing"
    near = get_close_matches(Path(path).name, [entry.name for entry in folder.iterdir()], n=1)
    meant = f" (did you mean {folder / near[0]}?)" if near else ""
    return f"not in the folder {folder}{meant}; on the Hub, if anywhere, and a dry run downloads nothing"


def rewards_of(config: Section) -> list[RewardConfig]:
    """The reward functions that a command calls."""
    rewards = list(getattr(config, "rewards", ()))
    if isinstance(config, EvalRunConfig) and config.red_team is not None:
        rewards.append(config.red_team.safety)
    return rewards


def models_of(config: Section) -> list[str]:
    """Folders and Hub names of all models and tokenizers that a command loads; what is built on the spot is not."""
    found: list[str | None] = []
    if isinstance(config, RunConfig | SupervisedConfig):
        found += [config.model.path, config.model.tokenizer.path]
    if isinstance(config, RunConfig) and config.uses_critic:
        found.append(config.critic.path)
    if isinstance(config, DPOConfig):
        found.append(config.dpo.reference)
    if isinstance(config, EvalRunConfig):
        found += [path for model in config.models.values() for path in (model.path, model.tokenizer)]
    if isinstance(config, PairsConfig):
        found += [config.model.path, config.model.tokenizer]
    judges = [getattr(config, name, None) for name in ("reward_model", "safety")]
    found += [judge.path for judge in judges if judge is not None]
    asked = [JudgeConfig(**reward.args) for reward in rewards_of(config) if reward.function == "judge"]
    if isinstance(config, SampledRunConfig) and config.judge is not None:
        asked.append(config.judge)
    found += [judge.model for judge in asked if judge.endpoint is None]
    return list(dict.fromkeys(path for path in found if path is not None and not path.startswith("scratch:")))


def rows_of(config: Section) -> list[RowsToOpen]:
    """The datasets that a command reads; tasks, which are made on the spot, are not."""
    found: list[RowsToOpen] = []
    if isinstance(config, RunConfig | SupervisedConfig):
        test_split = "test" if isinstance(config, RunConfig) else config.data.eval_split
        several = len(config.data.parts) > 1
        for part in config.data.parts:
            own = 0 if several or part.data.eval_path or config.data.eval_path else config.data.eval_size
            found.append(RowsToOpen(part.data.path, part.data.split, own, "data.eval_size"))
            found += _held_out(part.data.eval_path, test_split)
        found += _held_out(config.data.eval_path, test_split)
    if isinstance(config, SupervisedConfig):
        found += _held_out(config.eval.test_path, config.data.eval_split)
    if isinstance(config, SFTConfig) and config.plain_text is not None:
        found.append(RowsToOpen(config.plain_text.data.path, config.plain_text.data.split))
    if isinstance(config, RunConfig) and config.sft_data is not None:
        found += [RowsToOpen(part.data.path, part.data.split) for part in config.sft_data.parts]
    if isinstance(config, SampledRunConfig):
        found.append(RowsToOpen(config.data.path, config.data.split))
    if isinstance(config, EvalRunConfig):
        sections = [section for section in (config.perplexity, config.red_team) if section]
        found += [RowsToOpen(section.path, section.split) for section in sections]
    return [rows for rows in found if rows.path and not is_task(rows.path)]


def _held_out(path: str | None, split: str) -> Iterator[RowsToOpen]:
    if path is not None:
        yield RowsToOpen(path, split)


def limited(config: Config) -> Config:
    """The config with only the first rows of its data: as many as its held-out rows and some more."""
    data = getattr(config, "data", None)
    if data is None:
        return config
    held_out = data.eval_size if isinstance(config, RunConfig | SupervisedConfig) else 0
    update = {"data": _first_rows(data, max(MOST_ROWS, 2 * held_out))}
    if isinstance(config, RunConfig) and config.sft_data is not None:
        update["sft_data"] = _first_rows(config.sft_data, MOST_ROWS)
    return config.model_copy(update=update)


def _first_rows(data: RowsConfig, most: int) -> RowsConfig:
    """The section with at most so many rows of each of its sources."""
    update: dict[str, Any] = {"limit": min(data.limit or most, most)}
    if getattr(data, "sources", None):
        sources = [s.model_copy(update={"limit": min(s.limit or data.limit or most, most)}) for s in data.sources]
        update["sources"] = sources
    return data.model_copy(update=update)


def _open_all(config: Section) -> None:
    """As the command itself begins. Raises RlhfRayError."""
    if isinstance(config, RunConfig):
        from rlhf_ray.models.devices import choose_hardware
        from rlhf_ray.start.rl_inputs import check_inputs as check_rl

        # A cluster's workers may have what this machine has not.
        here = config.executor == "local" and config.device == "auto"
        check_rl(config, None, choose_hardware().device if here else config.device)
    elif isinstance(config, SupervisedConfig):
        from rlhf_ray.start.supervised_inputs import check_inputs as check_supervised

        check_supervised(config, None, lambda report: None)
    elif isinstance(config, EvalRunConfig):
        from rlhf_ray.evaluation.compare import check_inputs as check_eval

        check_eval(config)
    elif isinstance(config, PairsConfig):
        from rlhf_ray.feedback.pairs import check_inputs as check_pairs

        check_pairs(config)
    _open_models(models_of(config))


def _open_rewards(rewards: Sequence[RewardConfig]) -> None:
    from rlhf_ray.rewards.compose import reward_of

    for reward in rewards:
        reward_of(reward).close()


def _open_own_code(config: Section) -> list[str]:
    """What else a config names that its user has written. Raises ConfigError."""
    if not isinstance(config, TrainingRunConfig):
        return []
    from rlhf_ray.run.observer import find_observer

    for observer in config.logging.observers:
        find_observer(observer)
    return [*config.logging.observers, *own_formulas_of(config), *_own_engines(config)]


def _own_engines(config: Section) -> list[str]:
    """Engines that a user has written, found and not made. Raises ConfigError."""
    sections = [getattr(config, name, None) for name in ("generator", "learner", "critic")]
    own = dict.fromkeys(section.engine for section in sections if section is not None and is_own(section.engine))
    for engine in own:
        if not callable(find(engine, "engine")):
            raise ConfigError(f"engine {engine!r} cannot be called; name a function that makes one (docs/runs.md)")
    return list(own)


def own_formulas_of(config: Section) -> list[str]:
    """The loss and the advantage that a user has written, each with how it will be called. Raises ConfigError."""
    if not isinstance(config, RunConfig):
        return []
    from rlhf_ray.roles.formulas import own_formulas

    return [f"{place} as {call}" for place, call in own_formulas(config.algorithm).items()]


def _open_models(paths: Sequence[str]) -> None:
    """Raises ModelError for what is no model or tokenizer."""
    from rlhf_ray.models.loading import load_shape, load_tokenizer, local_folder

    for path in paths:
        folder = local_folder(path)
        if folder is None or (folder / "config.json").is_file():
            load_shape(path)
        load_tokenizer(path)


def _open_rows(datasets: Sequence[RowsToOpen]) -> None:
    """Raises DataError for a file that is missing or empty, ConfigError for one smaller than its held-out part."""
    for rows in datasets:
        count = sum(1 for _ in islice(read_rows(rows.path, split=rows.split), rows.held_out + 1))
        if count == 0:
            raise DataError(f"{rows.path}: the file has no rows; name another, or fill it")
        if count <= rows.held_out:
            raise ConfigError(
                f"{rows.key}={rows.held_out} would hold out all {count} rows of {rows.path}; lower it, or set "
                "data.eval_path"
            )


def _only_on_hub(path: str) -> bool:
    """Whether a model is neither a folder nor in the Hub's local cache. Raises ModelError for a missing folder."""
    from huggingface_hub import try_to_load_from_cache

    from rlhf_ray.models.loading import local_folder

    return local_folder(path) is None and not isinstance(try_to_load_from_cache(path, "config.json"), str)


def _is_here(path: str) -> bool:
    return not path.startswith(HUB_PREFIX) and (looks_local(path) or os.path.exists(path))
