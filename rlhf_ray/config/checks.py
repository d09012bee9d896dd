"""Settings that contradict each other, each with what, why and what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.data_checks import sft_problems, template_problems
from rlhf_ray.config.engines import AUTO, TrainingEngine
from rlhf_ray.config.given import GivenModel
from rlhf_ray.config.judge import judge_problems
from rlhf_ray.config.names import is_own
from rlhf_ray.config.ray_checks import placement_problems, replica_problems, transport_problems
from rlhf_ray.config.reward_checks import failure_problems
from rlhf_ray.config.rewards import RewardSettings
from rlhf_ray.config.rollout_checks import group_problems, shaping_problems
from rlhf_ray.config.schema import DataConfig, LearnerConfig, RolloutConfig, RunConfig
from rlhf_ray.config.sections import LoraConfig, ModelConfig, TrainEngineConfig
from rlhf_ray.config.sources import source_problems
from rlhf_ray.config.vllm_limits import generator_problems

# Names under reward/ that every run logs.
_TAKEN_REWARD_NAMES = ("mean", "std", "min", "max")


def contradictions(config: RunConfig, device: str | None = None) -> list[str]:
    """Everything that can be refused from the config alone.

    Args:
        device: what `config.device` has turned out to be (cuda, mps or cpu); None where nobody has looked yet, and
            then `auto` contradicts nothing.
    """
    device = device or config.device
    return [
        *_algorithm(config.algorithm, config.rollout, config.learner),
        *group_problems(config.algorithm, config.rollout),
        *shaping_problems(config.algorithm, config.learner, config.rollout.group_size),
        *_rewards(config.judging),
        *_batch_shapes(config),
        *_data(config.data, config.warm_start.completion),
        *sft_problems(config),
        *_lengths(config),
        *_model(config),
        *tokenizer_problems(config.model),
        *_training(config, device),
        *_generation(config, device),
        *generator_problems(config, device),
        *transport_problems(config, device),
        *replica_problems(config, device),
        *placement_problems(config, device),
    ]


def _algorithm(algorithm: AlgorithmConfig, rollout: RolloutConfig, learner: LearnerConfig) -> list[str]:
    problems = []
    if not algorithm.loss_facts.has_ratio and learner.epochs * learner.minibatches > 1:
        problems.append(
            f"algorithm.policy_loss={algorithm.policy_loss} has no importance ratio, so only the first of the "
            f"{learner.epochs * learner.minibatches} optimiser steps on a batch would be right; "
            "set algorithm.policy_loss=clipped, or learner.epochs=1 and learner.minibatches=1"
        )
    if algorithm.dual_clip is not None and not (algorithm.loss_facts.has_dual_clip or is_own(algorithm.policy_loss)):
        problems.append(
            f"algorithm.dual_clip belongs to the clipped loss, and policy_loss={algorithm.policy_loss} has no such "
            "bound; set algorithm.policy_loss=clipped, or leave dual_clip empty"
        )
    for name in ("advantage", "policy_loss"):
        if getattr(algorithm, f"{name}_args") and not is_own(getattr(algorithm, name)):
            problems.append(
                f"algorithm.{name}_args belongs to a function of your own, and {name}={getattr(algorithm, name)} takes "
                f"the settings of algorithm; remove {name}_args"
            )
    if algorithm.correction != "none" and (rollout.top_p < 1 or rollout.top_k > 0):
        problems.append(
            f"algorithm.correction={algorithm.correction} compares the learner with the generator, whose "
            "log-probabilities are those of what top_p and top_k left over; "
            "set rollout.top_p=1 and rollout.top_k=0, or algorithm.correction=none"
        )
    return problems


def _rewards(judging: RewardSettings) -> list[str]:
    problems = []
    if not judging.functions and judging.model is None:
        problems.append("no reward: every advantage would be 0; set rewards or reward_model.path")
    for index, reward in enumerate(judging.functions):
        name = reward.label
        if name in _TAKEN_REWARD_NAMES:
            problems.append(
                f"rewards.{index}: the name {name} is taken by the metric reward/{name} of the sum; "
                f"set rewards.{index}.name to another"
            )
        problems += failure_problems(reward, f"rewards.{index}") + judge_problems(reward, f"rewards.{index}")
    safety = judging.safety
    if safety is not None and safety.safe_label and safety.unsafe_label:
        problems.append("safety.safe_label and safety.unsafe_label say the same thing twice; remove one of them")
    return problems


def _trained(config: RunConfig) -> list[tuple[str, TrainEngineConfig]]:
    return [("learner", config.learner)] + ([("critic", config.critic)] if config.uses_critic else [])


def _batch_shapes(config: RunConfig) -> list[str]:
    problems = []
    for name, section in _trained(config):
        if config.rollout.prompts_per_step % section.minibatches:
            problems.append(
                f"rollout.prompts_per_step={config.rollout.prompts_per_step} is not divisible by "
                f"{name}.minibatches={section.minibatches}, so minibatches would differ in size; make it a multiple"
            )
        if section.world_size > config.samples_per_step // section.minibatches:
            problems.append(
                f"{name}.world_size={section.world_size} ranks share {config.samples_per_step // section.minibatches} "
                f"samples of a minibatch, so some would have none; use fewer ranks or more samples"
            )
    return problems


def _data(prompts: DataConfig, completion: str | None) -> list[str]:
    """`completion`: warm_start.completion."""
    problems = source_problems(prompts)
    for part in prompts.parts:
        data, key = part.data, part.key
        if data.path.startswith("task:") and data.split != "train":
            problems.append(
                f"{key}.split={data.split} of {data.path} is what the run is tested on; set {key}.split=train"
            )
        if completion is not None and (data.prompt_words or data.path.startswith("task:")):
            problems.append(
                f"warm_start.completion={completion} names a column of whole answers, but the "
                f"prompts are cut off texts ({key}.prompt_words) or come from a task with answers of its own; remove it"
            )
        problems += template_problems(data, key)
    return problems


def _lengths(config: RunConfig) -> list[str]:
    problems = []
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.model.path.startswith("scratch:") and longest > config.model.scratch.max_length:
        problems.append(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds model.scratch.max_length="
            f"{config.model.scratch.max_length}; raise max_length or lower one of the two"
        )
    parts = [part.data for part in config.data.parts]
    own_split = config.data.eval_path or any(data.path.startswith("task:") or data.eval_path for data in parts)
    if not own_split and config.eval.size > config.data.eval_size:
        problems.append(
            f"eval.size={config.eval.size} exceeds data.eval_size={config.data.eval_size}, the rows that are held out; "
            "raise data.eval_size or lower eval.size"
        )
    return problems


def _model(config: RunConfig) -> list[str]:
    problems = scratch_problems(config.model)
    if config.model.path != "scratch:lstm":
        return problems
    if not config.generator.facts.serves_lstm:
        problems.append(
            f"generator.engine={config.generator.engine} cannot serve scratch:lstm (it has no such model); "
            "set generator.engine=hf"
        )
    for name, section in _trained(config):
        if section.gradient_checkpointing:
            problems.append(f"{name}.gradient_checkpointing has nothing to recompute in scratch:lstm; set it to false")
    if config.learner.share_prompts:
        problems.append(
            "learner.share_prompts: the state of scratch:lstm runs through everything before a token, also through "
            "other answers; set it to false"
        )
    return problems


def scratch_problems(model: ModelConfig, kinds: Sequence[str] = ("qwen2", "gpt2", "lstm")) -> list[str]:
    """A model built on the spot: is there such a kind, and is its shape possible?"""
    if not model.path.startswith("scratch:"):
        return []
    problems, kind, scratch = [], model.path.removeprefix("scratch:"), model.scratch
    if kind not in kinds:
        known = [f"scratch:{name}" for name in kinds]
        problems.append(
            f"model.path=scratch:{kind} is not a built-in model; use {', '.join(known[:-1])} or {known[-1]}"
        )
    if kind in ("qwen2", "gpt2", "bert") and scratch.hidden_size % scratch.heads:
        problems.append(
            f"model.scratch.hidden_size={scratch.hidden_size} is not divisible by model.scratch.heads={scratch.heads}; "
            "make it a multiple"
        )
    elif kind == "qwen2" and scratch.hidden_size // scratch.heads % 2:
        problems.append(
            f"model.scratch.hidden_size/heads={scratch.hidden_size // scratch.heads} is odd, and rotary positions turn "
            "pairs; choose an even head size"
        )
    if kind != "lstm":
        return problems
    if scratch.intermediate_size is not None:
        problems.append("model.scratch.intermediate_size: scratch:lstm has no feed-forward part; remove it")
    if model.lora is not None:
        problems.append("model.lora: scratch:lstm has no linear layer besides its head to adapt; remove model.lora")
    return problems


def tokenizer_problems(model: ModelConfig) -> list[str]:
    """Does the tokenizer exist, and does it fit the model?"""
    path = model.tokenizer.path
    if path is None:
        if isinstance(model.path, GivenModel):
            return [
                "a model that was given from Python brings no tokenizer; give that too (tokenizer=..., or "
                "model.tokenizer.path: an object, a folder or a Hub name)"
            ]
        if model.path.startswith("scratch:"):
            return [
                "a model from scratch has no tokenizer of its own; set model.tokenizer.path to scratch:char, "
                "scratch:word, scratch:bpe or a folder"
            ]
        return []
    if not path.startswith("scratch:"):
        return []
    if not model.path.startswith("scratch:"):
        return [
            f"model.tokenizer.path={path} makes a new vocabulary, and {model.path} was trained with another; "
            "remove model.tokenizer.path, or name the tokenizer it was trained with"
        ]
    if path.removeprefix("scratch:") not in ("char", "word", "bpe"):
        return [
            f"model.tokenizer.path={path} is not a built-in tokenizer; use scratch:char, scratch:word or scratch:bpe"
        ]
    return []


def _training(config: RunConfig, device: str) -> list[str]:
    problems = []
    for name, section in _trained(config):
        problems += engine_problems(name, section, config.executor, device)
    if config.dtype == "bfloat16" and device == "mps":
        problems.append(
            "dtype=bfloat16 on MPS loses log-probabilities to rounding and is slower there; set dtype=float32 or auto"
        )
    return [*problems, *quantize_problems(config.model.lora, config.learner.facts, device)]


def quantize_problems(lora: LoraConfig | None, engine: TrainingEngine, device: str) -> list[str]:
    """Frozen weights in 4 bits: can the learner hold them so?"""
    problems = []
    if lora is None or lora.quantize == "none":
        return problems
    if engine.shards:
        problems.append(
            f"model.lora.quantize={lora.quantize} packs the weights, and ZeRO would cut the packed bytes to pieces; "
            "set learner.engine=torch, or model.lora.quantize=none"
        )
    if device == "mps":
        problems.append(
            f"model.lora.quantize={lora.quantize} needs bitsandbytes, which does not run on MPS; set device=cpu, or "
            "model.lora.quantize=none"
        )
    return problems


def engine_problems(name: str, section: TrainEngineConfig, executor: str, device: str) -> list[str]:
    """What a section that trains a model, called `name` in the config, cannot have together."""
    problems = []
    if not section.facts.shards and section.world_size > 1:
        problems.append(
            f"{name}.engine={section.engine} runs in one process, {name}.world_size={section.world_size} needs "
            f"sharding; set {name}.engine=deepspeed"
        )
    if executor == "local" and section.world_size > 1:
        problems.append(
            f"executor=local is one process, {name}.world_size={section.world_size} is not; "
            f"set executor=ray or {name}.world_size=1"
        )
    if not section.facts.shards and section.offload != "none":
        problems.append(
            f"{name}.offload={section.offload} is DeepSpeed's; set {name}.engine=deepspeed or {name}.offload=none"
        )
    elif section.offload == "parameters" and section.zero_stage != 3:
        problems.append(
            f"{name}.offload=parameters needs {name}.zero_stage=3, for only stage 3 shards parameters; set it"
        )
    if not section.facts.on_mac and device == "mps":
        problems.append(f"{name}.engine={section.engine} has no MPS backend; set {name}.engine=torch or device=cpu")
    return problems


def _generation(config: RunConfig, device: str) -> list[str]:
    generator, staleness, problems = config.generator, config.rollout.max_staleness, []
    if config.executor == "local" and generator.count > 1:
        problems.append(
            f"executor=local has one generator, generator.count={generator.count}; "
            "set executor=ray or generator.count=1"
        )
    if not generator.facts.on_mac and (sys.platform == "darwin" or device == "mps"):
        problems.append(f"generator.engine={generator.engine} does not run on a Mac; set generator.engine=hf")
    if generator.tensor_parallel > 1 and not _may_be_vllm(config, device):
        problems.append(
            "generator.tensor_parallel is vLLM's; set generator.engine=vllm or generator.tensor_parallel=1"
        )
    temperatures = {
        "rollout.temperature": config.rollout.temperature,
        "rollout.temperature_end": config.rollout.temperature_end or 0.0,
        "rollout.temperatures": max(config.rollout.temperatures, default=0.0),
        "eval.temperature": config.eval.temperature,
    }
    hottest = max(temperatures, key=temperatures.__getitem__)
    highest = generator.facts.highest_temperature
    if highest is not None and temperatures[hottest] > highest:
        problems.append(
            f"generator.engine={generator.engine} samples at temperatures up to {highest}, not "
            f"{hottest}={temperatures[hottest]}; lower it, or set generator.engine=hf"
        )
    if config.executor == "local" and staleness > 0:
        problems.append(
            "rollout.max_staleness overlaps generation with learning, and one process can do only one of them; "
            "set executor=ray or rollout.max_staleness=0"
        )
    if config.executor == "ray" and config.ray.colocate and staleness > 0:
        problems.append(
            "ray.colocate lets generator and learner take turns, rollout.max_staleness lets them overlap; choose one"
        )
    if staleness > 0 and config.algorithm.correction == "none":
        problems.append(
            f"rollout.max_staleness={staleness} learns from answers that older weights gave, and "
            "algorithm.correction=none would take them for the present policy's; set algorithm.correction=truncate"
        )
    return problems


def _may_be_vllm(config: RunConfig, device: str) -> bool:
    follows = config.executor == "ray" and device in ("auto", "cuda")
    return config.generator.facts.tensor_parallel or (config.generator.engine == AUTO and follows)
