"""Optional packages: what the settings will need of them, said before anything is computed and not at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from rlhf_ray.config.data import CleaningConfig
from rlhf_ray.config.evaluation import EvalRunConfig, SampledRunConfig
from rlhf_ray.config.rewards import RewardConfig
from rlhf_ray.config.schema import GeneratorConfig, RunConfig
from rlhf_ray.config.sections import LoraConfig, Section, TrainEngineConfig, TrainingRunConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.errors import ConfigError


@dataclass(frozen=True)
class Need:
    """`purpose` imports `module`, which comes with the optional dependencies `extra` of pyproject.toml."""

    module: str
    extra: str
    purpose: str


# Only the data itself says whether there are people's pairs to agree with.
AGREEMENT = Need("scipy", "eval", "human_pairs")

_BUILTIN_REWARDS = {
    "math": Need("math_verify", "rewards", "the reward math"),
    "rouge": Need("rouge_score", "rewards", "the reward rouge"),
}
# These rewards, and the evaluation's distinct-n and self-BLEU, can count Chinese words.
_COUNTS_WORDS = ("keyword", "rouge", "length_penalty", "repetition_penalty")
_CHINESE = Need("rjieba", "chinese", "chinese=words")
_ENDPOINT = Need("openai", "judge", "a judge behind an endpoint")


def needs_of(config: Section) -> list[Need]:
    """What this process will need for one command. On Ray the roles live elsewhere, and so do their packages."""
    needs: list[Need] = []
    if isinstance(config, TrainingRunConfig):
        needs += [Need(name, name, "logging.loggers") for name in config.logging.loggers if name != "tensorboard"]
        if config.executor == "ray":
            return [*needs, Need("ray", "ray", "executor=ray")]
        needs += _of_lora(config.model.lora)
    if isinstance(config, SupervisedConfig):
        needs += [*_of_engine("learner", config.learner), *_of_cleaning(config.data.cleaning)]
    if isinstance(config, RunConfig):
        needs += _of_engine("learner", config.learner)
        needs += _of_engine("critic", config.critic) if config.uses_critic else []
        needs += _of_cleaning(config.sft_data.cleaning) if config.sft_data is not None else []
        needs += [*_of_generator(config.generator), *_of_rewards(config.rewards)]
    if isinstance(config, SampledRunConfig):
        needs += [*_of_generator(config.generator), *_of_rewards(config.rewards)]
        if config.judge is not None and config.judge.endpoint is not None:
            needs.append(_ENDPOINT)
    if isinstance(config, EvalRunConfig):
        needs.append(Need("sacrebleu", "eval", "self-BLEU"))
        needs += [_CHINESE] if config.chinese == "words" else []
        if len(config.models) > 1 and (config.has_reward or config.judge is not None):
            needs.append(Need("scipy", "eval", "win rates"))
        if config.red_team is not None:
            needs += _of_rewards([config.red_team.safety])
    return needs


def require(needs: Iterable[Need]) -> None:
    """Raises ConfigError, which names what to install, if one of the packages is not there."""
    missing = list(dict.fromkeys(need for need in needs if find_spec(need.module) is None))
    if not missing:
        return
    extras = ",".join(dict.fromkeys(need.extra for need in missing))
    packages = ", ".join(f"{need.module} (for {need.purpose})" for need in missing)
    raise ConfigError(f"not installed: {packages}; these are optional packages: pip install 'rlhf-ray[{extras}]'")


def _of_engine(section: str, config: TrainEngineConfig) -> list[Need]:
    package = config.facts.package
    return [] if package is None else [Need(package, package, f"{section}.engine={config.engine}")]


def _of_cleaning(cleaning: CleaningConfig) -> list[Need]:
    near = [Need("datasketch", "quality", "cleaning.near_duplicates")] if cleaning.near_duplicates is not None else []
    return [*near, *_of_privacy("cleaning.privacy", cleaning.privacy)]


def _of_privacy(name: str, mode: str) -> list[Need]:
    return [Need("phonenumbers", "quality", name)] if mode != "none" else []


def _of_generator(config: GeneratorConfig) -> list[Need]:
    package = config.facts.package
    if package is None:
        return []
    extra = package if shutil.which("nvidia-smi") else f"{package}-cpu"
    return [Need(package, extra, f"generator.engine={config.engine}")]


def _of_lora(lora: LoraConfig | None) -> list[Need]:
    if lora is None:
        return []
    packed = [Need("bitsandbytes", "qlora", f"model.lora.quantize={lora.quantize}")] if lora.quantize != "none" else []
    return [Need("peft", "peft", "model.lora"), *packed]


def _of_rewards(rewards: Sequence[RewardConfig]) -> list[Need]:
    needs = [_BUILTIN_REWARDS[reward.function] for reward in rewards if reward.function in _BUILTIN_REWARDS]
    if any(reward.function in _COUNTS_WORDS and reward.args.get("chinese") == "words" for reward in rewards):
        needs.append(_CHINESE)
    if any(reward.function == "judge" and reward.args.get("endpoint") for reward in rewards):
        needs.append(_ENDPOINT)
    return needs
