"""From a config to a run: the policy it starts from, its data, and its roles, local or on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.clock import Clock
from rlhf_ray.config.extras import needs_of, require
from rlhf_ray.config.load import on_device, validated
from rlhf_ray.config.rewards import right_by
from rlhf_ray.config.schema import EvalConfig, RolloutConfig, RunConfig, SyncConfig
from rlhf_ray.config.sections import TrainingRunConfig
from rlhf_ray.data.fingerprint import CHAT_TEMPLATE, fingerprint_of_template
from rlhf_ray.data.prompt_sources import load_split
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.stream import described
from rlhf_ray.data.turn_end import with_turn_ends
from rlhf_ray.errors import ConfigError
from rlhf_ray.loops.best import BestPolicy, measure_of
from rlhf_ray.loops.evaluate import Evaluator
from rlhf_ray.loops.export import export
from rlhf_ray.loops.rl import train
from rlhf_ray.models.devices import Hardware, choose_hardware
from rlhf_ray.models.fits import limits_of, require_critic_fits, require_end, require_policy_fits, require_served
from rlhf_ray.models.flops import device_name, peak_flops
from rlhf_ray.models.loading import load_shape, load_tokenizer, stop_token_ids
from rlhf_ray.models.size import Size, saved_size
from rlhf_ray.rewards.compose import reward_of
from rlhf_ray.roles.advantages import AdvantageEstimator
from rlhf_ray.roles.factory import Assets, Rank
from rlhf_ray.roles.formulas import own_formulas
from rlhf_ray.roles.makers import Makers
from rlhf_ray.roles.protocols import Roles, Sampling
from rlhf_ray.roles.reference import AdapterFreeReference
from rlhf_ray.roles.sft_term import SFTRows
from rlhf_ray.rollout.order import prompt_stream
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.cost import Passes, Workload
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.observer import find_observer
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start.sft_rows import SFTData, load_sft_data
from rlhf_ray.start.warm_start import make_tokenizer, starting_policy
from rlhf_ray.sync.canary import DEFAULT_BOUND, Canary, canary_tokens


def run_rl(
    config: RunConfig, run_dir: str | Path | None = None, *, resume: bool = False, observers: Iterable[Any] = (),
    clock: Clock = time.monotonic,
) -> dict[str, Any]:  # fmt: skip
    """A whole run: warm start, training, evaluation, export. Returns what summary.json holds.

    Args:
        observers: who is told of each step beside those of `config.logging`: functions f(StepRecord), or Observers.
        clock: what the run's time is measured with.
    Raises:
        RlhfRayError: whatever went wrong, saying what to do. The run directory keeps everything up to there.
    """
    config = validated(config)
    hardware = hardware_of(config)
    config = on_device(config, hardware.device)
    told = [find_observer(given) for given in (*config.logging.observers, *observers)]
    directory = RunDirectory.open(config.name, run_dir, resume=resume)
    with kept_only_if_used(directory):
        config = frozen_clock(config, directory)
        tokenizer, train_prompts, held_out, sft = check_inputs(config, directory.start, hardware.device)
    read = sources_of(config.eval, train_prompts, held_out, tokenizer) | (sft.fingerprints if sft else {})
    run = TrainingRun(config, directory, read, observers=[make() for make in told], clock=clock)
    try:
        run.note(
            f"device: {hardware}; generator: {config.generator.engine}; learner: {config.learner.engine}"
        )
        if len(train_prompts.parts) > 1:
            run.note(described(train_prompts.parts))
        for line in [*left_out(train_prompts, held_out), *(sft.notes if sft else [])]:
            run.note(line)
        if len(held_out) < config.eval.size:
            run.note(f"held out: {len(held_out)} prompts; there are no more, and eval.size={config.eval.size}")
        policy, tokenizer_path = starting_policy(
            config, directory.start, own_hardware(hardware), on_step=run.warm_start_progress(),
            note=run.note,
        )
        assets = Assets(policy, tokenizer_path, hardware, config.model.trust_remote_code)
        named = stop_token_ids(policy, tokenizer, trust_remote_code=config.model.trust_remote_code)
        stop = with_turn_ends(named, tokenizer)
        with open_roles(config, assets, sft.rows if sft else None, run.note) as roles:
            run.workload = workload_of(config, assets, roles)
            evaluator = Evaluator(
                roles.generator, roles.reward, held_out, sampling_of(config.rollout, stop, config.eval.temperature),
                seed=config.seed, right=right_by(config.rewards), best=_best(config, roles, directory),
            )  # fmt: skip
            rollouts = _rollouts(config, roles, train_prompts, sampling_of(config.rollout, stop), run)
            try:
                longest = max(map(len, train_prompts.token_ids)) + config.rollout.max_new_tokens
                canary = _canary(config.sync, tokenizer, longest, hardware, config.seed)
                result = train(config, roles, rollouts, evaluator, canary, run)
                if evaluator.best is not None:
                    result["best"] = evaluator.best.found
            finally:
                rollouts.close()
            export(roles.learner, directory.model, directory.adapter if config.model.lora else None)
        run.finish("finished", **result)
    except BaseException as error:
        run.fail(error)
        raise
    return directory.read_summary()


def hardware_of(config: TrainingRunConfig) -> Hardware:
    """Where the roles compute: on this machine, or on what the cluster's workers have."""
    if config.executor == "ray":
        try:
            from rlhf_ray.remote.cluster import gpus_of_cluster
        except ImportError as error:
            raise ConfigError(
                f"executor=ray needs Ray, which cannot be imported ({error}); install it with "
                "`pip install 'rlhf-ray[ray]'`, or set executor=local"
            ) from error

        # There is no run yet that could print it.
        gpus = gpus_of_cluster(config.ray.address, config.ray.start_deadline_s, partial(print, flush=True))
        if gpus is not None:
            return choose_hardware(config.device, config.dtype, cuda=gpus > 0, mps=False)
    return choose_hardware(config.device, config.dtype)


def own_hardware(roles: Hardware) -> Hardware:
    """What this process computes on itself (the warm start): its best device, unless the run is to stay on the CPU."""
    if roles.device == "cpu":
        return roles
    return choose_hardware(dtype="float32" if roles.dtype == torch.float32 else "auto")


@contextmanager
def kept_only_if_used(directory: RunDirectory) -> Iterator[None]:
    """Bad input leaves no empty folder behind, for `--resume auto` would take it for the newest run."""
    try:
        yield
    except BaseException:
        if not any(directory.path.iterdir()):
            directory.path.rmdir()
        raise


def check_inputs(
    config: RunConfig, start: Path | None, device: str = "auto"
) -> tuple[Any, PromptSet, PromptSet, SFTData | None]:
    """(tokenizer, training prompts, held-out prompts, rows of sft_data): all that people get wrong, read before
    anything is made.

    Args:
        start: the folder that an earlier part of the run has made its tokenizer in; it need not be there.
        device: what the run computes on; auto where nobody has looked yet.

    Raises:
        RlhfRayError: a file, a row, a tokenizer or a reward that cannot be used, or a package that is not there.
    """
    require(needs_of(config))
    own_formulas(config.algorithm)
    for reward in config.rewards:
        reward_of(reward).close()
    for path in config.judging.networks:
        load_tokenizer(path)
        load_shape(path)
    tokenizer = load_tokenizer(start) if start is not None and start.is_dir() else make_tokenizer(config)
    require_end(tokenizer, config.model.tokenizer.path or config.model.path, "completion")
    train, held_out = load_data(config, tokenizer)
    prompt_stream(train, config.rollout.order, config.seed)
    prompts, new = [*train.token_ids, *held_out.token_ids], config.rollout.max_new_tokens
    path, trust = config.model.path, config.model.trust_remote_code
    require_policy_fits(limits_of(path, trust_remote_code=trust), tokenizer, prompts, new)
    require_served(
        path, config.generator, device, longest=config.longest_sequence, bfloat16=config.dtype == "bfloat16",
        trust_remote_code=trust,
    )  # fmt: skip
    if config.uses_critic and config.critic.path is not None:
        critic = limits_of(config.critic.path, trust_remote_code=trust)
        require_critic_fits(critic, tokenizer, max(map(len, prompts)), new)
    sft = config.sft_data and load_sft_data(
        config.sft_data, config.model, tokenizer, seed=config.seed, clock=config.clock
    )
    return tokenizer, train, held_out, sft


def load_data(config: RunConfig, tokenizer: Any) -> tuple[PromptSet, PromptSet]:
    """(training prompts, held-out prompts). Of one file other rows each; a prompt that has two rows may be in both."""
    references = config.rollout.reference_field if config.rollout.reference_answers else None
    return load_split(
        config.data, tokenizer, clock=config.clock, asked=config.eval.size, reference_field=references
    )


def sources_of(
    evaluation: EvalConfig, train_prompts: PromptSet, held_out: PromptSet, tokenizer: Any
) -> dict[str, str]:
    """Fingerprints of all the rows that the run reads, by source, and of the template that makes them prompts."""
    found = {CHAT_TEMPLATE: fingerprint_of_template(tokenizer.chat_template)}
    found |= {prompts.label: prompts.read for prompts in train_prompts.sets}
    # Held-out rows of a file of their own are read as far as they are asked for.
    more = {prompts.label: prompts.read for prompts in held_out.sets if prompts.label not in found}
    return {**found, **{f"{label}, the first {evaluation.size}": read for label, read in more.items()}}


def left_out(train_prompts: PromptSet, held_out: PromptSet) -> list[str]:
    """A line for each source of prompts some of whose rows are not used: how many, and why."""
    # Held-out prompts that are a part of the same rows are counted with them.
    by_label = {prompts.label: prompts for prompts in (*held_out.sets, *train_prompts.sets)}
    labels = dict.fromkeys(prompts.label for prompts in (*train_prompts.sets, *held_out.sets))
    lines = ((label, by_label[label].left_out) for label in labels)
    return [f"{label}: prompts left out: {what}" for label, what in lines if what]


@contextmanager
def open_roles(
    config: RunConfig, assets: Assets, sft: SFTRows | None, note: Callable[[str], None]
) -> Iterator[Roles]:
    """The roles as this config places them; closed at the end, also after an error. `note` hears what it waits for."""
    if config.executor == "ray":
        from rlhf_ray.remote.roles import open_remote_roles

        with open_remote_roles(config, assets, sft, note) as roles:
            yield roles
        return
    transport = "in_process" if config.sync.transport == "auto" else config.sync.transport
    began = time.monotonic()
    engine = config.generator.engine
    if config.generator.facts.slow_start:
        note(f"loading the generator ({engine})")
    makers = Makers.of(config, assets, transport)
    generator = makers.generator()
    if config.generator.facts.slow_start:
        note(f"the generator ({engine}) is ready in {time.monotonic() - began:.0f} s")
    try:
        alone = Rank(deadline_s=config.ray.call_deadline_s)
        learner = makers.learner(sft, alone)
        learner.connect(generator)
        own_reference = AdapterFreeReference(learner) if config.uses_reference else None
        yield Roles(
            generator=generator,
            reward=makers.reward(),
            learner=learner,
            advantages=AdvantageEstimator(config.algorithm),
            reference=makers.reference() if makers.reference else own_reference,
            critic=makers.critic(alone) if makers.critic else None,
            replicas=(generator,),
            device_name=device_name(assets.hardware.device),
        )
    finally:
        generator.close()


def _best(config: RunConfig, roles: Roles, directory: RunDirectory) -> BestPolicy | None:
    if config.eval.best_by is None:
        return None
    measure = measure_of(config.eval, config.judging, config.rollout.max_new_tokens)
    return BestPolicy(
        config.eval.best_by, roles.learner, directory, measure=measure, lora=config.model.lora is not None
    )


def workload_of(config: RunConfig, assets: Assets, roles: Roles) -> Workload:
    """What the steps compute with, for `perf/mfu` and `cost/device_hours`."""
    policy = saved_size(assets.policy, "policy", config.model.lora)
    critic = policy and Size(policy.base, policy.base)  # LoRA is the policy's alone
    if config.critic.path is not None:
        critic = saved_size(config.critic.path)
    peak = None if roles.device_name is None else peak_flops(roles.device_name, assets.hardware.dtype)
    return Workload(policy, critic, roles.devices, peak, passes_a_step(config))


def passes_a_step(config: RunConfig) -> Passes:
    critic = config.critic if config.uses_critic else None
    return Passes(
        forwards=1 + config.uses_reference + config.uses_old_logprobs,
        policy=config.learner.epochs,
        critic=critic.epochs if critic else 0,
        critic_alone=critic.warmup_steps if critic else 0,
    )


def sampling_of(rollout: RolloutConfig, stop: tuple[int, ...], temperature: float | None = None) -> Sampling:
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        top_p=rollout.top_p if temperature is None else 1.0,
        top_k=rollout.top_k if temperature is None else 0,
        stop_token_ids=stop,
    )


def _rollouts(config: RunConfig, roles: Roles, prompts: PromptSet, sampling: Sampling, run: TrainingRun) -> Rollouts:
    return Rollouts(
        roles.generator, roles.reward, prompts, config.rollout, sampling, algorithm=config.algorithm,
        steps=config.steps, seed=config.seed, timer=run.timer, texts=max(3, config.logging.rollouts),
        gather=roles.gather, store=roles.store, early_rewards=roles.early_rewards,
    )  # fmt: skip


def _canary(sync: SyncConfig, tokenizer: Any, longest: int, hardware: Hardware, seed: int) -> Canary | None:
    """`longest`: tokens of the longest prompt and answer together."""
    if not sync.canary:
        return None
    bound = sync.canary_bound or DEFAULT_BOUND[str(hardware.dtype).removeprefix("torch.")]
    # No longer than what the run itself writes, and no tokens that were added later: that fits the model.
    return Canary(canary_tokens(tokenizer.vocab_size, length=max(2, min(16, longest - 1)), seed=seed), bound)
