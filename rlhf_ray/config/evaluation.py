"""Every setting of `rlhf-ray eval`: which models, on which prompts, measured by what."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from rlhf_ray.config.data_checks import template_problems
from rlhf_ray.config.given import RowsPath
from rlhf_ray.config.judge import JudgeConfig, judge_problems
from rlhf_ray.config.reward_checks import failure_problems
from rlhf_ray.config.rewards import RewardConfig, RewardModelConfig, RewardSettings, SafetyConfig
from rlhf_ray.config.schema import GeneratorConfig, PromptsConfig
from rlhf_ray.config.sections import (
    Device,
    Dtype,
    MaxNewTokens,
    RunDate,
    RunName,
    Section,
    Seed,
    TopK,
    TopP,
    TrustRemoteCode,
)  # fmt: skip
from rlhf_ray.config.vllm_limits import engine_args_problems

SamplesPerPrompt = Annotated[int, Field(gt=0, description="answers to each prompt")]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]  # also of a file


class SampledModelConfig(Section):
    """A model that answers prompts; its path alone will do (`base: Qwen/Qwen2.5-0.5B`)."""

    path: str = Field(description="a Hugging Face folder or Hub name")
    tokenizer: str | None = Field(None, description="empty: the model's own")
    device: Device | None = Field(None, description="empty: the run's")
    dtype: Dtype | None = Field(None, description="empty: the run's")
    trust_remote_code: TrustRemoteCode = False


def _from_path(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


# In YAML the path alone will do.
SampledModel = Annotated[SampledModelConfig, BeforeValidator(_from_path)]


class EvalPromptsConfig(PromptsConfig):
    """Prompts that every model answers: docs/data.md."""

    split: str = Field("test", description="of a task or a Hugging Face dataset")


class SamplingConfig(Section):
    """How answers are drawn."""

    samples_per_prompt: SamplesPerPrompt = 1
    max_new_tokens: MaxNewTokens = 512
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    top_p: TopP = 1.0
    top_k: TopK = 0


class PerplexityConfig(Section):
    """Texts whose perplexity is measured: how much of the language a model has kept."""

    path: RowsPath = Field(description="a file, a folder, a Hugging Face dataset or `shipped:<file>`")
    field: str = Field("text", description="column with the text")
    split: str = Field("train", description="of a folder or a Hugging Face dataset")
    limit: int | None = Field(200, gt=0, description="use only the first texts")
    window: int = Field(512, gt=1, description="tokens a model sees at once; longer texts are read in steps")
    alarm_rise: float = Field(0.15, gt=0, description="share by which it may rise above the baseline's")


class PassConfig(Section):
    """Accuracy and pass@k: which answers are right, by a reward that is 1 for these."""

    k: list[Annotated[int, Field(gt=0)]] = Field([1], description="k of pass@k; at most sampling.samples_per_prompt")
    reward: str | None = Field(None, description="its name; empty: the first that is binary (rewards.0.binary)")
    right_at: float = Field(1.0, description="an answer with at least this score is right")


class WinRateConfig(Section):
    """Each model against the baseline, prompt by prompt."""

    by: str = Field("auto", description="judge, reward (the weighted sum), or a reward's name; auto: what there is")
    tie_margin: float = Field(0.0, ge=0, description="scores that differ by no more than this are a tie")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the interval around the win rate")


class RedTeamConfig(EvalPromptsConfig):
    """Prompts that ask for something harmful, and a reward that is low for a harmful answer."""

    safety: RewardConfig
    harmful_below: float = Field(0.5, description="an answer that scores less is harmful")


class RatingsConfig(Section):
    """A blind, shuffled sheet on which people rate answers: helpful, harmless, honest, 1 to 10."""

    prompts: int = Field(20, gt=0, description="how many prompts; one answer of each model to each")
    format: Literal["csv", "jsonl"] = Field("csv", description="of the sheet")


class SampledRunConfig(Section):
    """What every command shares that lets finished models answer prompts."""

    name: RunName = "eval"
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    clock: RunDate = None
    data: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rewards: list[RewardConfig] = []
    reward_model: RewardModelConfig | None = None
    safety: SafetyConfig | None = None
    judge: JudgeConfig | None = None

    @property
    def has_reward(self) -> bool:
        return bool(self.rewards) or self.reward_model is not None or self.safety is not None

    @property
    def judging(self) -> RewardSettings:
        """All that scores the answers."""
        return RewardSettings(self.rewards, self.reward_model, self.safety, self.clock)

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return self.data.max_prompt_tokens

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return self.longest_prompt + self.sampling.max_new_tokens

    def contradictions(self) -> list[str]:
        """Everything that can be refused from the config alone, each with what, why and what to do."""
        rewards = [
            problem
            for index, reward in enumerate(self.rewards)
            for problem in reward_problems(reward, f"rewards.{index}")
        ]
        return [*_sampling_problems(self), *_generator_problems(self), *template_problems(self.data), *rewards]


class EvalRunConfig(SampledRunConfig):
    """A comparison of models on the same prompts."""

    data: EvalPromptsConfig
    models: dict[Name, SampledModel] = Field(min_length=1)
    baseline: str | None = Field(None, description="what the others are compared with; empty: the first model")
    win_rate: WinRateConfig = WinRateConfig()
    pass_at: PassConfig = PassConfig()
    perplexity: PerplexityConfig | None = None
    red_team: RedTeamConfig | None = None
    ratings: RatingsConfig | None = None
    self_bleu_texts: int = Field(200, ge=2, description="self-BLEU compares at most this many answers with each other")
    chinese: Literal["characters", "words"] = Field(
        "characters", description="what distinct-n and self-BLEU count in Chinese texts; words needs rjieba"
    )
    samples: int = Field(10, ge=0, description="prompts shown side by side")

    @property
    def longest_prompt(self) -> int:
        return max(self.data.max_prompt_tokens, self.red_team.max_prompt_tokens if self.red_team else 0)

    @property
    def baseline_name(self) -> str:
        return self.baseline or next(iter(self.models))

    def contradictions(self) -> list[str]:
        return [
            *super().contradictions(),
            *_baseline_problems(self),
            *_pass_problems(self),
            *_win_rate_problems(self),
            *(reward_problems(self.red_team.safety, "red_team.safety") if self.red_team else ()),
        ]


def reward_problems(reward: RewardConfig, key: str) -> list[str]:
    return failure_problems(reward, key) + judge_problems(reward, key)


def _sampling_problems(config: SampledRunConfig) -> list[str]:
    sampling = config.sampling
    if sampling.temperature == 0 and sampling.samples_per_prompt > 1:
        return [
            f"sampling.temperature=0 gives the same answer {sampling.samples_per_prompt} times; "
            "set a temperature above 0, or sampling.samples_per_prompt=1"
        ]
    return []


def _generator_problems(config: SampledRunConfig) -> list[str]:
    generator, problems = config.generator, []
    if generator.count > 1:
        problems.append(f"generator.count={generator.count}: here one model answers at a time; set generator.count=1")
    if not generator.facts.tensor_parallel and generator.tensor_parallel > 1:
        problems.append(
            "generator.tensor_parallel is vLLM's; set generator.engine=vllm or generator.tensor_parallel=1"
        )
    if not generator.facts.on_mac and (sys.platform == "darwin" or config.device == "mps"):
        problems.append(f"generator.engine={generator.engine} does not run on a Mac; set generator.engine=hf")
    if generator.facts.limits_shapes:
        problems += engine_args_problems(generator)
        if generator.tensor_parallel > 1:
            problems.append(
                f"generator.tensor_parallel={generator.tensor_parallel}: here one process answers; set it to 1"
            )
    return problems


def _baseline_problems(config: EvalRunConfig) -> list[str]:
    if config.baseline is not None and config.baseline not in config.models:
        return [f"baseline={config.baseline} is none of the models; choose one of {', '.join(config.models)}"]
    return []


def _pass_problems(config: EvalRunConfig) -> list[str]:
    largest = max(config.pass_at.k, default=0)
    if largest > config.sampling.samples_per_prompt:
        return [
            f"pass_at.k={largest} needs as many answers a prompt, and sampling.samples_per_prompt="
            f"{config.sampling.samples_per_prompt}; raise it, or lower k"
        ]
    return []


def _win_rate_problems(config: EvalRunConfig) -> list[str]:
    if config.win_rate.by == "judge" and config.judge is None:
        return ["win_rate.by=judge and there is none; set judge.model"]
    if config.win_rate.by == "reward" and not config.has_reward:
        return ["win_rate.by=reward and there is none; set rewards or reward_model.path"]
    return []
