"""From settings to role objects: the same functions build a local role and the one inside a Ray actor.

Each takes its own section of the config first, the assets second, then what it needs of the rest of the run; a rank of
several comes last. Every argument is plain and picklable. A maker imports what its own role needs inside of itself:
whoever makes one role does not load the libraries of all. `roles/makers.py` gives each its part of a run's config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.rewards import RewardSettings
from rlhf_ray.config.schema import CriticConfig, GeneratorConfig, LearnerConfig, RolloutConfig
from rlhf_ray.config.sections import LoraConfig, TrainEngineConfig
from rlhf_ray.config.user_code import find
from rlhf_ray.models.devices import Hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_ray.models.engine import TrainEngine
    from rlhf_ray.models.sharded import Sharded
    from rlhf_ray.roles.critic import Critic
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.roles.protocols import Generator
    from rlhf_ray.roles.reference import Reference
    from rlhf_ray.roles.reward import Reward
    from rlhf_ray.roles.sft_term import SFTRows, SFTTerm


@dataclass(frozen=True)
class Assets:
    """What every role starts from: folders (or Hub names) that all machines of the run can read.

    `trust_remote_code`: run the Python code that comes with them.
    """

    policy: str
    tokenizer: str
    hardware: Hardware
    trust_remote_code: bool = False


@dataclass(frozen=True)
class GeneratorUse:
    """What a run asks of its generator, whichever engine that is.

    Attributes:
        transport: how new weights come to it: in_process, shared_memory, nccl or cuda_ipc.
        longest: tokens of a prompt and its answer together, at most.
        shares_gpu: it takes turns with others on the same GPU, so that it must be able to sleep.
    """

    transport: str
    longest: int
    shares_gpu: bool = False


@dataclass(frozen=True)
class Course:
    """The run as a network that is trained sees it: the seed of its choices, and the steps of its learning rate's
    schedule, which begins at `first`.
    """

    seed: int
    steps: int
    first: int = 0


@dataclass(frozen=True)
class Sending:
    """How weights leave the learner: see `sync.factory.make_sender`."""

    transport: str
    bucket_mb: int
    receivers: int
    keep: bool = False


@dataclass(frozen=True)
class Rank:
    """A training process among its peers.

    Attributes:
        address, port: where rank 0 listens.
        deadline_s: of each collective. One of the ranks may write a large model while the others wait.
    """

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    deadline_s: float = 1800.0


def make_generator(settings: GeneratorConfig, assets: Assets, use: GeneratorUse) -> Generator:
    """By the engine's maker: config/engines.py, or the user's own."""
    return find(settings.facts.maker, "engine")(settings, assets, use)


def make_vllm_generator(settings: GeneratorConfig, assets: Assets, use: GeneratorUse) -> Generator:
    from rlhf_ray.models.fits import limits_of
    from rlhf_ray.roles.generator_vllm import VLLMGenerator

    return VLLMGenerator(
        assets.policy,
        dtype=assets.hardware.dtype,
        transport=use.transport,
        tensor_parallel_size=settings.tensor_parallel,
        # What the settings allow, or what the model has positions for: the prompts that there are have been checked.
        max_model_len=limits_of(assets.policy, trust_remote_code=assets.trust_remote_code).longest(use.longest),
        gpu_memory_utilization=settings.gpu_memory_utilization or (0.4 if use.shares_gpu else 0.8),
        kv_cache_gb=settings.kv_cache_gb_on_cpu,
        enforce_eager=settings.enforce_eager,
        sleep_mode=use.shares_gpu,
        engine_args=settings.engine_args,
        trust_remote_code=assets.trust_remote_code,
    )


def make_hf_generator(settings: GeneratorConfig, assets: Assets, use: GeneratorUse) -> Generator:
    """It takes weights by any transport that ends in one process, and sequences of any length."""
    from rlhf_ray.roles.generator_hf import HFGenerator

    tokenizer = _tokenizer(assets)
    return HFGenerator(
        _policy(assets),
        pad_token_id=tokenizer.pad_token_id,
        batch_size=settings.batch_size,
        kv_cache_gb=settings.kv_cache_gb if assets.hardware.device == "cuda" else settings.kv_cache_gb_on_cpu,
    )


def make_reference(passes: LearnerConfig, assets: Assets, temperature: float, rank: Rank = Rank()) -> Reference:
    """A model of its own; `config.holds_reference` says whether the run needs one.

    `passes`: it computes as the learner does, with as many tokens at once. Of several ranks each holds a part of it.
    """
    from rlhf_ray.roles.reference import Reference

    sharded = _sharded_policy(assets, rank) if rank.world_size > 1 else None
    return Reference(
        sharded.module if sharded else _policy(assets),
        sharded=sharded,
        temperature=temperature,
        tokens_per_microbatch=passes.tokens_per_microbatch,
        share_prompts=passes.share_prompts,
    )


def make_reward(settings: RewardSettings, assets: Assets, rank: Rank = Rank()) -> Reward:
    """Of several ranks each holds a part of the networks, and the first alone calls the functions."""
    from rlhf_ray.models.loading import stop_token_ids
    from rlhf_ray.rewards.classifier import Classifier, Safety
    from rlhf_ray.rewards.compose import RewardSet, reward_of
    from rlhf_ray.roles.reward import Reward, RewardModel

    functions = [reward_of(reward) for reward in settings.functions] if rank.rank == 0 else []
    model, safety, policys = None, None, _tokenizer(assets)
    if settings.model is not None:
        network, tokenizer, sharded = _judge(settings.model.path, assets.hardware.dtype, assets, rank)
        model = RewardModel(
            network, tokenizer, settings.model, policy=policys, clock=settings.clock, sharded=sharded
        )  # fmt: skip
    if settings.safety is not None:
        judge = None
        if rank.world_size > 1:
            network, tokenizer, sharded = _judge(settings.safety.path, torch.float32, assets, rank)
            judge = Classifier(network, tokenizer, settings.safety.path, sharded)
        safety = Safety(
            settings.safety, assets.hardware.device, policy=policys, clock=settings.clock, model=judge
        )  # fmt: skip
    stop = stop_token_ids(assets.policy, policys, trust_remote_code=assets.trust_remote_code)
    return Reward(RewardSet(functions), policys, model=model, safety=safety, stop=stop)


def _judge(
    path: str, dtype: torch.dtype, assets: Assets, rank: Rank
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Sharded | None]:
    """A sequence classifier in this process, or this rank's part of it."""
    from rlhf_ray.models.loading import load_empty_classifier, load_reward_model, load_tokenizer

    if rank.world_size == 1:
        return *load_reward_model(path, dtype=dtype, device=assets.hardware.device), None
    whole, empty = partial(load_reward_model, path, dtype=dtype), partial(load_empty_classifier, path, dtype=dtype)
    sharded = _sharded(lambda: whole()[0], empty, dtype, assets, rank)
    tokenizer = load_tokenizer(path)
    if sharded.module.config.pad_token_id is None:
        sharded.module.config.pad_token_id = tokenizer.pad_token_id
    return sharded.module, tokenizer, sharded


def make_learner(
    settings: LearnerConfig, assets: Assets, algorithm: AlgorithmConfig, rollout: RolloutConfig,
    lora: LoraConfig | None, course: Course, sending: Sending, sft: SFTRows | None = None, rank: Rank = Rank(),
) -> Learner:  # fmt: skip
    """`rollout`: at what temperature, and to what length, its answers are sampled."""
    from rlhf_ray.models.loading import load_policy
    from rlhf_ray.models.lora import apply_lora, quantization
    from rlhf_ray.roles.learner import Learner
    from rlhf_ray.sync.factory import make_sender

    packing = {} if lora is None else quantization(lora.quantize, assets.hardware.dtype)
    # Masters are kept in float32 whatever the compute dtype: load what the folder holds, unrounded.
    model = load_policy(assets.policy, dtype=torch.float32, trust_remote_code=assets.trust_remote_code, **packing)
    if lora is not None:
        model = apply_lora(model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, seed=course.seed)
    sender = make_sender(
        sending.transport,
        bucket_mb=sending.bucket_mb,
        rank=rank.rank,
        receivers=sending.receivers,
        keep=sending.keep,
        device=assets.hardware.device,
    )
    tokenizer = _tokenizer(assets)
    return Learner(
        train_engine(settings, model, assets.hardware, rank),
        settings,
        algorithm,
        tokenizer=tokenizer,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        sender=sender,
        seed=course.seed,
        total_steps=course.steps,
        first_step=course.first,
        sft=None if sft is None else _sft_term(sft, tokenizer, algorithm.sft_coef, course.seed, settings),
    )


def _sft_term(
    rows: SFTRows, tokenizer: PreTrainedTokenizerBase, coef: float, seed: int, passes: LearnerConfig
) -> SFTTerm:
    from rlhf_ray.roles.objectives import SFT
    from rlhf_ray.roles.sft_term import SFTTerm

    return SFTTerm(
        rows, SFT.of(tokenizer), coef=coef, seed=seed, tokens_per_microbatch=passes.tokens_per_microbatch
    )  # fmt: skip


def make_critic(settings: CriticConfig, assets: Assets, course: Course, rank: Rank = Rank()) -> Critic:
    from rlhf_ray.models.heads import ValueModel
    from rlhf_ray.roles.critic import Critic

    model = ValueModel.from_pretrained(
        settings.path or assets.policy, dtype=torch.float32, trust_remote_code=assets.trust_remote_code
    )
    engine = train_engine(settings, model, assets.hardware, rank)
    return Critic(engine, settings, seed=course.seed, total_steps=course.steps)


def _tokenizer(assets: Assets) -> PreTrainedTokenizerBase:
    from rlhf_ray.models.loading import load_tokenizer

    return load_tokenizer(assets.tokenizer, trust_remote_code=assets.trust_remote_code)


def _policy(assets: Assets) -> PreTrainedModel:
    from rlhf_ray.models.loading import load_policy

    hardware = assets.hardware
    return load_policy(
        assets.policy, dtype=hardware.dtype, device=hardware.device, trust_remote_code=assets.trust_remote_code
    )


def _sharded_policy(assets: Assets, rank: Rank) -> Sharded:
    from rlhf_ray.models.loading import load_empty_policy, load_policy

    dtype = assets.hardware.dtype
    read = {"dtype": dtype, "trust_remote_code": assets.trust_remote_code}
    whole, empty = partial(load_policy, assets.policy, **read), partial(load_empty_policy, assets.policy, **read)
    return _sharded(whole, empty, dtype, assets, rank)


def _sharded(
    whole: Callable[[], PreTrainedModel], empty: Callable[[], PreTrainedModel], dtype: torch.dtype, assets: Assets,
    rank: Rank,
) -> Sharded:  # fmt: skip
    from rlhf_ray.models.sharded import Sharded

    return Sharded(
        whole, empty, device=assets.hardware.device, dtype=dtype, rank=rank.rank, world_size=rank.world_size,
        address=rank.address, port=rank.port or None, timeout_s=rank.deadline_s,
    )  # fmt: skip


def train_engine(settings: TrainEngineConfig, model: torch.nn.Module, hardware: Hardware, rank: Rank) -> TrainEngine:
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
            "timeout_s": rank.deadline_s,
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
