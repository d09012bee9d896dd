"""From settings to role objects: the same functions build a local role and the one inside a Ray actor.

Every argument is plain and picklable: paths, the config, a rank. A maker imports what its own role needs inside of
itself: whoever makes one role does not load the libraries of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.sections import ModelConfig, TrainEngineConfig
from rlhf_ray.models.devices import Hardware
from rlhf_ray.user_code import find

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_ray.models.engine import TrainEngine
    from rlhf_ray.roles.critic import Critic
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.roles.protocols import Generator
    from rlhf_ray.roles.reference import Reference
    from rlhf_ray.roles.reward import Reward
    from rlhf_ray.roles.sft_term import SFTRows, SFTTerm


@dataclass(frozen=True)
class Assets:
    """What every role starts from: folders (or Hub names) that all machines of the run can read."""

    policy: str
    tokenizer: str
    hardware: Hardware


@dataclass(frozen=True)
class Rank:
    """A training process among its peers. `address` and `port` are where rank 0 listens."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def make_generator(config: RunConfig, assets: Assets, transport: str) -> Generator:
    """By the engine's maker: config/engines.py, or the user's own."""
    return find(config.generator.facts.maker, "engine")(config, assets, transport)


def make_vllm_generator(config: RunConfig, assets: Assets, transport: str) -> Generator:
    from rlhf_ray.roles.generator_vllm import VLLMGenerator

    generator = config.generator
    return VLLMGenerator(
        assets.policy,
        dtype=assets.hardware.dtype,
        transport=transport,
        tensor_parallel_size=generator.tensor_parallel,
        max_model_len=_longest_sequence(config, assets),
        gpu_memory_utilization=generator.gpu_memory_utilization or (0.4 if config.ray.colocate else 0.8),
        kv_cache_gb=generator.kv_cache_gb_on_cpu,
        enforce_eager=generator.enforce_eager,
        sleep_mode=config.ray.colocate,
        engine_args=generator.engine_args,
        trust_remote_code=config.model.trust_remote_code,
    )


def make_hf_generator(config: RunConfig, assets: Assets, transport: str) -> Generator:
    from rlhf_ray.roles.generator_hf import HFGenerator

    generator = config.generator
    tokenizer = _tokenizer(config.model, assets)
    model = _policy(config.model, assets)
    return HFGenerator(
        model,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=generator.batch_size,
        kv_cache_gb=generator.kv_cache_gb if assets.hardware.device == "cuda" else generator.kv_cache_gb_on_cpu,
    )


def _longest_sequence(config: RunConfig, assets: Assets) -> int:
    """What the settings allow, or what the model has positions for: the prompts that there are have been checked."""
    from rlhf_ray.models.loading import load_shape

    allowed = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    shape = load_shape(assets.policy, trust_remote_code=config.model.trust_remote_code).get_text_config()
    return min(allowed, getattr(shape, "max_position_embeddings", None) or allowed)


def make_reference(config: RunConfig, assets: Assets) -> Reference:
    """A model of its own; `config.holds_reference` says whether the run needs one."""
    from rlhf_ray.roles.reference import Reference

    return Reference(
        _policy(config.model, assets),
        temperature=config.rollout.temperature,
        tokens_per_microbatch=config.learner.tokens_per_microbatch,
        share_prompts=config.learner.share_prompts,
    )


def make_reward(config: RunConfig, assets: Assets) -> Reward:
    from rlhf_ray.models.loading import load_reward_model, stop_token_ids
    from rlhf_ray.rewards.classifier import Safety
    from rlhf_ray.rewards.compose import RewardSet, reward_of
    from rlhf_ray.roles.reward import Reward, RewardModel

    functions = [reward_of(reward) for reward in config.rewards]
    model, policys = None, _tokenizer(config.model, assets)
    if config.reward_model is not None:
        path = config.reward_model.path
        network, tokenizer = load_reward_model(path, dtype=assets.hardware.dtype, device=assets.hardware.device)
        model = RewardModel(network, tokenizer, config.reward_model, policy=policys, clock=config.clock)
    safety = None
    if config.safety is not None:
        safety = Safety(config.safety, assets.hardware.device, policy=policys, clock=config.clock)
    stop = stop_token_ids(assets.policy, policys, trust_remote_code=config.model.trust_remote_code)
    return Reward(RewardSet(functions), policys, model=model, safety=safety, stop=stop)


def make_learner(
    config: RunConfig, assets: Assets, transport: str, sft: SFTRows | None = None, rank: Rank = Rank()
) -> Learner:
    from rlhf_ray.models.loading import load_policy
    from rlhf_ray.models.lora import apply_lora, quantization
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.sync.factory import make_sender

    lora, trust = config.model.lora, config.model.trust_remote_code
    packing = {} if lora is None else quantization(lora.quantize, assets.hardware.dtype)
    # Masters are kept in float32 whatever the compute dtype: load what the folder holds, unrounded.
    model = load_policy(assets.policy, dtype=torch.float32, trust_remote_code=trust, **packing)
    if lora is not None:
        model = apply_lora(model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, seed=config.seed)
    sender = make_sender(
        transport,
        bucket_mb=config.sync.bucket_mb,
        rank=rank.rank,
        receivers=config.generator.count * config.generator.tensor_parallel,
        device=assets.hardware.device,
    )
    tokenizer = _tokenizer(config.model, assets)
    return Learner(
        train_engine(config.learner, model, assets.hardware, rank, config.ray.call_deadline_s),
        config.learner,
        config.algorithm,
        tokenizer=tokenizer,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        sender=sender,
        seed=config.seed,
        total_steps=config.steps,
        first_step=config.critic.warmup_steps if config.uses_critic else 0,
        sft=_sft_term(config, sft, tokenizer),
    )


def _sft_term(config: RunConfig, rows: SFTRows | None, tokenizer: PreTrainedTokenizerBase) -> SFTTerm | None:
    if config.sft_data is None or rows is None:
        return None
    from rlhf_ray.roles.objectives import SFT
    from rlhf_ray.roles.sft_term import SFTTerm

    return SFTTerm(
        rows,
        SFT.of(tokenizer),
        coef=config.algorithm.sft_coef,
        batch_size=config.sft_data.batch_size,
        seed=config.seed,
        tokens_per_microbatch=config.learner.tokens_per_microbatch,
    )


def make_critic(config: RunConfig, assets: Assets, rank: Rank = Rank()) -> Critic:
    from rlhf_ray.models.heads import ValueModel
    from rlhf_ray.roles.critic import Critic

    model = ValueModel.from_pretrained(
        config.critic.path or assets.policy, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    engine = train_engine(config.critic, model, assets.hardware, rank, config.ray.call_deadline_s)
    return Critic(engine, config.critic, seed=config.seed, total_steps=config.steps)


def _tokenizer(model: ModelConfig, assets: Assets) -> PreTrainedTokenizerBase:
    from rlhf_ray.models.loading import load_tokenizer

    return load_tokenizer(assets.tokenizer, trust_remote_code=model.trust_remote_code)


def _policy(model: ModelConfig, assets: Assets):
    from rlhf_ray.models.loading import load_policy

    hardware = assets.hardware
    return load_policy(
        assets.policy, dtype=hardware.dtype, device=hardware.device, trust_remote_code=model.trust_remote_code
    )


def train_engine(
    settings: TrainEngineConfig, model: torch.nn.Module, hardware: Hardware, rank: Rank, deadline_s: float
) -> TrainEngine:
    """`deadline_s`: of each collective of N ranks. One of them may write a large model while the others wait."""
    from rlhf_ray.models.engine import build_engine

    sharding = {}
    if settings.facts.shards:
        sharding = {
            "zero_stage": settings.zero_stage,
            "offload": settings.offload,
            "rank": rank.rank,
            "world_size": rank.world_size,
            "master_address": rank.address,
            "master_port": rank.port or None,
            "timeout_s": deadline_s,
        }
    return build_engine(
        settings.engine,
        model,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        device=hardware.device,
        dtype=hardware.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        **sharding,
    )
