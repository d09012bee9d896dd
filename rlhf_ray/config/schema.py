"""Every setting of a reinforcement-learning run, its type, its default and its meaning.

The algorithm's are in `config/algorithm.py`, the rewards' in `config/rewards.py`, those of supervised runs too in
`config/sections.py`. `config/load.py` reads YAML and overrides into these; `config/checks.py` refuses settings that
contradict each other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlhf_ray.config.algorithm import PASSES, AlgorithmConfig, passes_of
from rlhf_ray.config.data import SFTDataConfig
from rlhf_ray.config.engines import GENERATORS, GeneratorEngine, GeneratorName, generator_facts
from rlhf_ray.config.given import FunctionName, RowsPath
from rlhf_ray.config.rewards import RewardConfig, RewardModelConfig, RewardSettings, SafetyConfig
from rlhf_ray.config.sections import (
    MOST_WORKERS,
    LearningRate,
    MaxNewTokens,
    RowsConfig,
    Section,
    TopK,
    TopP,
    TrainEngineConfig,
    TrainingRunConfig,
)  # fmt: skip
from rlhf_ray.config.sources import AS_SECTION, SeveralSources, SourceConfig


class PromptsConfig(RowsConfig):
    """Prompts, and where they come from: docs/data.md."""

    split: str = Field("train", description="of a task, a folder or a Hugging Face dataset")
    field: str | None = Field(None, description="column with the prompt; empty: by the dataset's type (docs/data.md)")
    prompt_words: int | None = Field(None, gt=0, description="cut each text to its first words: the prompt")
    max_prompt_tokens: int = Field(1024, gt=0, description="longest prompt, with what the template adds")
    overlong_prompts: Literal["error", "drop"] = Field(
        "error", description="longer prompts: end the run, or are left out and counted"
    )


class PromptSourceConfig(SourceConfig):
    """One of several sources. What it leaves empty is as in the section that it stands in."""

    field: str | None = Field(None, description=AS_SECTION)
    prompt_words: int | None = Field(None, gt=0, description=AS_SECTION)


class DataConfig(SeveralSources, PromptsConfig):
    """Prompts to learn from, and those that are held out."""

    eval_path: RowsPath | None = Field(None, description="held-out prompts; a task has its own, else eval_size rows")
    eval_size: int = Field(256, ge=0, description="last prompts, held out where there is no eval_path and no task")
    cache_dir: str | None = Field(
        None, description="folder that keeps the prompts of large files (8 MiB and more) tokenized for the next start; "
        "empty: rlhf_ray_prompts in the cache of `datasets`; none: nowhere"
    )  # fmt: skip
    sources: list[PromptSourceConfig] = Field([], description="several sources, instead of `path`")


class WarmStartConfig(Section):
    """Supervised steps before reinforcement learning, for models that start from nothing."""

    steps: int = Field(0, ge=0, description="how many; 0: no warm start")
    batch_size: int = Field(128, gt=0, description="rows of each step")
    lr: float = Field(1e-3, gt=0, description="learning rate at first; it falls in a line to a tenth")
    max_length: int = Field(64, gt=1, description="tokens; longer texts are cut")
    completion: str | None = Field(
        None, description="column with the answer that is learned after each prompt; empty: whole texts are learned"
    )
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="stop early when this share of the completions would be written right greedily"
    )


class RolloutConfig(Section):
    """What is sampled in each step, and how."""

    prompts_per_step: int = Field(32, gt=0, description="prompts of each step")
    group_size: int = Field(8, gt=0, description="answers sampled for each prompt")
    max_new_tokens: MaxNewTokens = 512
    temperature: float = Field(1.0, gt=0, description="at which answers are drawn and, later, their log-probs computed")
    temperature_end: float | None = Field(None, gt=0, description="the temperature moves here over the run")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="of the members of a group, in turn; empty: all at temperature"
    )
    reference_answers: int = Field(
        0, ge=0, description="members of each group that are not sampled but taken from reference_field"
    )
    reference_field: str = Field("answer", description="column with a good answer, or with a list of them")
    top_p: TopP = 1.0
    top_k: TopK = 0
    order: FunctionName = Field(
        "shuffled", description="of the prompts: shuffled (anew in each epoch), as_given, or `module:function` or "
        "`file.py:function` of your own (a curriculum: docs/data.md)"
    )  # fmt: skip
    max_staleness: int = Field(0, ge=0, description="weight versions that generation runs behind learning")


VLLM_MAX_TEMPERATURE = GENERATORS["vllm"].highest_temperature


class GeneratorConfig(Section):
    """What runs the model that answers."""

    engine: GeneratorName = Field(
        "auto", description="auto: vllm on the CUDA devices of a Ray cluster where it is installed; else hf; or your "
        "own, `module:function` or `file.py:function` (runs.md)"
    )  # fmt: skip

    @property
    def facts(self) -> GeneratorEngine:
        """What is known of this engine."""
        return generator_facts(self.engine)

    count: int = Field(1, gt=0, le=MOST_WORKERS, description="generator actors (ray)")
    tensor_parallel: int = Field(1, gt=0, le=MOST_WORKERS, description="vLLM: GPUs that share one generator's model")
    batch_size: int = Field(1024, gt=0, description="hf: most sequences written side by side; does not depend on count")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="vLLM on a GPU: its share of the memory; empty: 0.8, and 0.4 with ray.colocate"
    )
    kv_cache_gb: float | None = Field(
        None, gt=0, description="memory for keys and values in GiB, of hf and of vLLM on CPU: what does not fit waits; "
        "empty: 1, and for hf on a GPU half of what is free"
    )  # fmt: skip
    enforce_eager: bool = Field(True, description="vLLM: false captures CUDA graphs: faster, later to start, untested")
    engine_args: dict[str, Any] = Field(
        {}, description="vLLM: further arguments of its engine, like max_num_seqs or async_scheduling"
    )

    @property
    def rows(self) -> int:
        """Answers that it writes side by side, where its memory holds them."""
        own = self.facts.rows
        return self.batch_size if own is None else self.engine_args.get("max_num_seqs") or own

    @property
    def kv_cache_gb_on_cpu(self) -> float:
        """What `kv_cache_gb` says, or leaves to the engine, where there is no GPU."""
        return self.kv_cache_gb or 1.0


class LearnerConfig(TrainEngineConfig):
    """How the policy is trained."""

    epochs: int = Field(1, gt=0, description="passes over each step's rollouts; with algorithm.name=ppo: 4")
    minibatches: int = Field(1, gt=0, description="optimiser steps in each pass; with algorithm.name=ppo: 4")
    stop_kl: float | None = Field(
        None, gt=0, description="end a step's passes early, once the policy is this far from the one before them: "
        "KL in nats a token, mean over a minibatch (`target_kl` elsewhere)"
    )  # fmt: skip
    share_prompts: bool = Field(
        False,
        description="compute a prompt once for all of its answers, where that is cheaper: they stand behind it in one "
        "line, each blind to the others; in the learner and the reference, for models with full attention",
    )


class CriticConfig(TrainEngineConfig):
    """Used by advantages that need a critic (gae)."""

    path: str | None = Field(None, description="start from this model; empty: from the policy")
    lr: LearningRate = 1e-5
    epochs: int = Field(1, gt=0, description="passes over each step's rollouts; with algorithm.name=ppo: 4")
    minibatches: int = Field(1, gt=0, description="optimiser steps in each pass; with algorithm.name=ppo: 4")
    value_clip: float | None = Field(
        0.2, gt=0, description="the loss lets a value move so far from the one before the update; empty: no such bound"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which only the critic learns")


class ReferenceConfig(Section):
    """The frozen policy that the KL is measured against, where a run holds one."""

    count: int = Field(1, gt=0, le=MOST_WORKERS, description="replicas that share a step's answers (ray)")
    world_size: int = Field(
        1, gt=0, le=MOST_WORKERS, description="processes (ranks) of each, which hold a part of its weights each: "
        "DeepSpeed's ZeRO-3 (ray)"
    )  # fmt: skip


class JudgesConfig(Section):
    """The workers that compute `rewards`, `reward_model` and `safety`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_functions(cls, given: Any) -> Any:
        if isinstance(given, str | list):
            raise PydanticCustomError(
                "workers_expected", "says how many workers judge; the functions that they call are listed in `rewards`"
            )
        return given

    count: int = Field(
        1, gt=0, le=MOST_WORKERS, description="replicas, each with all that judges; a step's answers go to them in "
        "parcels (ray)"
    )  # fmt: skip
    world_size: int = Field(
        1, gt=0, le=MOST_WORKERS, description="processes (ranks) of each, which hold a part of the weights of "
        "reward_model and safety each: DeepSpeed's ZeRO-3; functions run in the first (ray)"
    )  # fmt: skip


class SyncConfig(Section):
    """How the learner's new weights reach the generators."""

    transport: Literal["auto", "in_process", "shared_memory", "nccl", "cuda_ipc"] = Field(
        "auto", description="auto: in_process for executor=local; on Ray shared_memory; to vLLM on GPUs cuda_ipc with "
        "ray.colocate, else nccl"
    )  # fmt: skip
    bucket_mb: int = Field(256, gt=0, description="MiB that travel at once; a larger tensor travels alone")
    deadline_s: float = Field(300.0, gt=0, description="Ray: seconds that one sync may take")
    canary: bool = Field(
        True, description="compare both sides' log-probs of some fixed tokens after each sync; an alarm if they differ"
    )
    canary_bound: float | None = Field(
        None, gt=0, description="largest log-prob difference, in nats; empty: 1e-3 in float32, 0.3 in bfloat16"
    )


class EvalConfig(Section):
    """Answers to held-out prompts, judged by the run's rewards, before, after and on the way."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    size: int = Field(256, gt=0, description="held-out prompts")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    best_by: str | None = Field(
        None, description="reward, accuracy or `reward/<name>`: the policy that was best by this number of an "
        "evaluation is kept in best_model/ beside the last one; empty: only the last"
    )  # fmt: skip


class RunConfig(TrainingRunConfig):
    """A reinforcement-learning run."""

    steps: int = Field(100, gt=0, description="how often answers are sampled, judged and learned from")
    data: DataConfig
    sft_data: SFTDataConfig | None = Field(None, description="rows for algorithm.sft_coef")
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rewards: list[RewardConfig] = []
    reward_model: RewardModelConfig | None = None
    safety: SafetyConfig | None = None
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: JudgesConfig = JudgesConfig()
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_passes(cls, given: Any) -> Any:
        """`algorithm.name` says how often a step's rollouts are learned from, as it says what its loss is."""
        algorithm = given.get("algorithm") if isinstance(given, dict) else None
        if not isinstance(algorithm, dict) or str(algorithm.get("name")) not in PASSES:
            return given
        rollout = given.get("rollout")
        prompts = rollout.get("prompts_per_step") if isinstance(rollout, dict) else None
        if not isinstance(prompts, int):
            prompts = RolloutConfig().prompts_per_step
        passes = passes_of(algorithm["name"], prompts)
        sections = {name: given.get(name) or {} for name in ("learner", "critic")}
        return {**given, **{name: {**passes, **own} for name, own in sections.items() if isinstance(own, dict)}}

    @property
    def uses_reference(self) -> bool:
        """With an adaptive controller the coefficient can grow from its start, so the model is needed."""
        return self.algorithm.kl_coef > 0 or bool(self.algorithm.kl_coef_end)

    @property
    def holds_reference(self) -> bool:
        """Whether a model of its own is the reference: a LoRA policy without its adapter is the one it began as."""
        return self.uses_reference and self.model.lora is None

    @property
    def judging(self) -> RewardSettings:
        """All that judges this run's answers."""
        return RewardSettings(self.rewards, self.reward_model, self.safety, self.clock)

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.advantage_facts.baseline == "critic"

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether the log-probabilities before the update are computed in a pass of their own.

        A single optimiser step updates the very policy that they would come from, so the update has them anyway.
        """
        several_steps = self.learner.epochs * self.learner.minibatches > 1
        return several_steps or self.algorithm.kl_in == "reward" or self.rollout.max_staleness > 0

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def samples_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size
