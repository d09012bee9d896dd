"""Every setting of a reinforcement-learning run, its type, its default and its meaning.

What it shares with supervised runs is in `config/sections.py`. `config/load.py` reads YAML and overrides into these;
`config/checks.py` refuses settings that contradict each other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.data import SFTDataConfig
from rlhf_ray.config.limits import LARGEST_REWARD
from rlhf_ray.config.rewards import RewardConfig, RewardModelConfig, SafetyConfig
from rlhf_ray.config.sections import MOST_WORKERS, RowsConfig, Section, TrainEngineConfig, TrainingRunConfig
from rlhf_ray.config.sources import SeveralSources, SourceConfig


class PromptsConfig(RowsConfig):
    """`path` is a file, a folder, a Hugging Face dataset name, `shipped:<file>` or `task:arithmetic`: docs/data.md."""

    split: str = Field("train", description="of a task, a folder or a Hugging Face dataset")
    field: str | None = Field(None, description="column with the prompt; empty: by the dataset's type (docs/data.md)")
    prompt_words: int | None = Field(None, gt=0, description="cut each text to its first words: the prompt")
    max_prompt_tokens: int = Field(1024, gt=0)
    overlong_prompts: Literal["error", "drop"] = "error"


class PromptSourceConfig(SourceConfig):
    field: str | None = None
    prompt_words: int | None = Field(None, gt=0)


class DataConfig(SeveralSources, PromptsConfig):
    """Prompts to learn from, and those that are held out."""

    eval_path: str | None = Field(None, description="held-out prompts; a task has its own, else eval_size rows")
    eval_size: int = Field(256, ge=0)
    sources: list[PromptSourceConfig] = Field([], description="several sources, instead of `path`")


class WarmStartConfig(Section):
    """Supervised steps before reinforcement learning, for models that start from nothing."""

    steps: int = Field(0, ge=0)
    batch_size: int = Field(128, gt=0)
    lr: float = Field(1e-3, gt=0)
    max_length: int = Field(64, gt=1, description="tokens; longer texts are cut")
    completion: str | None = Field(
        None, description="column with the answer that is learned after each prompt; empty: whole texts are learned"
    )
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="stop early when this share of the completions would be written right greedily"
    )


class RolloutConfig(Section):
    prompts_per_step: int = Field(32, gt=0)
    group_size: int = Field(8, gt=0, description="answers sampled for each prompt")
    max_new_tokens: int = Field(512, gt=0)
    temperature: float = Field(1.0, gt=0)
    temperature_end: float | None = Field(None, gt=0, description="the temperature moves here over the run")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="of the members of a group, in turn; empty: all at temperature"
    )
    reference_answers: int = Field(
        0, ge=0, description="members of each group that are not sampled but taken from reference_field"
    )
    reference_field: str = Field("answer", description="column with a good answer, or with a list of them")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_staleness: int = Field(0, ge=0, description="weight versions that generation may run behind learning")


VLLM_MAX_TEMPERATURE = 2.0


class GeneratorConfig(Section):
    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto: vllm on the CUDA devices of a Ray cluster where it is installed; else hf"
    )
    count: int = Field(1, gt=0, le=MOST_WORKERS, description="generator actors (ray)")
    tensor_parallel: int = Field(1, gt=0, le=MOST_WORKERS)
    batch_size: int = Field(1024, gt=0, description="hf: sequences generated together; does not depend on count")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="vLLM on a GPU: its share of the memory; empty: 0.8, and 0.4 with ray.colocate"
    )
    kv_cache_gb: float = Field(1.0, gt=0, description="vLLM on CPU: memory of its KV cache")
    enforce_eager: bool = Field(True, description="vLLM: false captures CUDA graphs: faster, later to start, untested")
    engine_args: dict[str, Any] = Field({}, description="vLLM: further arguments of its engine, like max_num_seqs")


# What each algorithm means; every field may still be set by hand.
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo"},
    "ppo": {"advantage": "gae", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.05, "whiten_advantages": True},
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "seq_sum_const"},
    "dapo": {
        "advantage": "grpo",
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "resample_rounds": 3,
        "overlong_buffer": 0.2,
    },
    "gspo": {
        "advantage": "grpo",
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq_mean",
    },
    "cispo": {"advantage": "grpo", "policy_loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "rloo", "aggregation": "seq_mean"},
    "reinforce": {"advantage": "reinforce", "policy_loss": "policy_gradient"},
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.01},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"},
    "remax": {"advantage": "remax", "policy_loss": "policy_gradient", "aggregation": "seq_sum_const"},
}


# How often the learner and the critic go over each step's rollouts, and in how many minibatches. PPO's paper does so 3
# to 15 times (Schulman et al. 2017, tables 3 to 5), TRL's PPO 4 times. The other algorithms take one step.
_PASSES = {"ppo": 4}


def passes_of(name: str, prompts_per_step: int) -> dict[str, int]:
    """`epochs` and `minibatches` of the learner and the critic that an algorithm means, where the config says nothing.

    Minibatches are to be of one size, so of 6 prompts there are 2 and not 4.
    """
    passes = _PASSES.get(name, 1)
    return {"epochs": passes, "minibatches": math.gcd(passes, prompts_per_step)}


class AlgorithmConfig(Section):
    """`name` fills in the other fields (see PRESETS); each may still be set by hand."""

    name: Literal[
        "grpo", "ppo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline",
        "remax",
    ] = "grpo"  # fmt: skip
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "remax", "pass_at_k", "gae"
    ] = "grpo"
    normalize_std: bool = Field(True, description="grpo: divide by the standard deviation of the group")
    k: int = Field(4, gt=0, description="pass_at_k: answers of which the best counts")
    moving_baseline: bool = Field(False, description="reinforce: subtract the mean of past rewards, not the batch's")
    whiten_advantages: bool = False
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    policy_loss: Literal["clipped", "gspo", "cispo", "policy_gradient"] = "clipped"
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregation: Literal["token_mean", "seq_mean", "seq_sum_const"] = "token_mean"
    entropy_coef: float = Field(0.0, ge=0)
    entropy_coef_end: float | None = Field(None, ge=0, description="entropy_coef moves here over the run")
    sft_coef: float = Field(
        0.0, ge=0, description="PPO-ptx: adds so much of the loss of sft (nats a token) on rows of sft_data"
    )
    kl_in: Literal["loss", "reward"] = "loss"
    kl_coef: float = Field(0.0, ge=0, description="0: the reference model is not even loaded")
    kl_coef_end: float | None = Field(None, ge=0, description="kl_controller=fixed: kl_coef moves here over the run")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    kl_controller: Literal["fixed", "adaptive", "scheduled"] = "fixed"
    kl_target: float = Field(6.0, gt=0, description="adaptive: wanted KL of a whole completion, in nats")
    kl_target_end: float | None = Field(None, gt=0, description="scheduled: kl_target moves here over the run")
    kl_horizon: int = Field(10_000, gt=0, description="adaptive: samples in which it moves by 20 % or less")
    resample_rounds: int = Field(
        0, ge=0, description="dynamic sampling: how often to replace prompts whose answers all earn the same"
    )
    overlong_buffer: float = Field(
        0.0, ge=0, le=1, description="last share of max_new_tokens in which a length penalty grows to -1; 0: none"
    )
    reward_clip: float | None = Field(None, gt=0, le=LARGEST_REWARD)
    normalize_rewards: Literal["none", "running", "source", "group"] = Field(
        "none",
        description="divide rewards by the standard deviation of all so far, or of all so far from the same source; "
        "or centre and divide them within each group",
    )
    source_field: str = Field("data_source", description="normalize_rewards=source: column that names the source")
    correction: Literal["none", "truncate", "mask"] = Field(
        "none", description="importance weights for differences between generator and learner"
    )
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    correction_cap: float = Field(2.0, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {**PRESETS.get(str(given.get("name", "grpo")), {}), **given}
        return given

    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Those of these settings that `function` takes by keyword only."""
        known, parameters = self.model_dump(), inspect.signature(function).parameters.values()
        return {p.name: known[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in known}


class LearnerConfig(TrainEngineConfig):
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
    lr: float = Field(1e-5, gt=0)
    epochs: int = Field(1, gt=0, description="passes over each step's rollouts; with algorithm.name=ppo: 4")
    minibatches: int = Field(1, gt=0, description="optimiser steps in each pass; with algorithm.name=ppo: 4")
    value_clip: float | None = Field(0.2, gt=0)
    warmup_steps: int = Field(0, ge=0, description="steps in which only the critic learns")


class SyncConfig(Section):
    transport: Literal["auto", "in_process", "shared_memory", "nccl", "cuda_ipc"] = "auto"
    bucket_mb: int = Field(256, gt=0)
    deadline_s: float = Field(300.0, gt=0)
    canary: bool = True
    canary_bound: float | None = Field(
        None, gt=0, description="largest log-prob difference, in nats; empty: 1e-3 in float32, 0.3 in bfloat16"
    )


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    size: int = Field(256, gt=0, description="held-out prompts")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    best_by: str | None = Field(
        None, description="reward, accuracy or reward/<name>: the policy that was best by this number of an evaluation "
        "is kept in best_model/ beside the last one; empty: only the last"
    )  # fmt: skip


class RunConfig(TrainingRunConfig):
    """A reinforcement-learning run."""

    steps: int = Field(100, gt=0)
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
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_passes(cls, given: Any) -> Any:
        """`algorithm.name` says how often a step's rollouts are learned from, as it says what its loss is."""
        algorithm = given.get("algorithm") if isinstance(given, dict) else None
        if not isinstance(algorithm, dict) or str(algorithm.get("name")) not in _PASSES:
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
    def judge_paths(self) -> list[str]:
        """Where the networks come from that the reward role holds."""
        return [judge.path for judge in (self.reward_model, self.safety) if judge is not None]

    @property
    def reward_needs_gpu(self) -> bool:
        """Whether the reward role computes with a network of its own: a classifier, or a local AI judge."""

        def on_gpu(reward: RewardConfig) -> bool:
            if reward.function == "judge":
                return reward.args.get("endpoint") is None and reward.args.get("device", "auto") in ("auto", "cuda")
            return reward.function == "classifier" and str(reward.args.get("device")).startswith("cuda")

        return bool(self.judge_paths) or any(map(on_gpu, self.rewards))

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.advantage == "gae"

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether the log-probabilities before the update are computed in a pass of their own.

        A single optimiser step updates the very policy that they would come from, so the update has them anyway.
        """
        several_steps = self.learner.epochs * self.learner.minibatches > 1
        return several_steps or self.algorithm.kl_in == "reward" or self.rollout.max_staleness > 0

    @property
    def samples_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size
